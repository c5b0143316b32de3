"""The object-store server of the tests is one for every client."""

import pytest
from etils import epath

pytestmark = pytest.mark.integration


def test_one_bucket_for_all_clients(gs):
    import tensorstore
    from google.cloud import storage

    file = epath.Path(gs.address) / "clients" / "a.txt"  # TensorFlow's
    file.write_text("hello")
    with file.open("a") as opened:
        opened.write(", world")
    assert file.read_text() == "hello, world" and file.stat().length == 12
    assert tensorstore.KvStore.open(f"{gs.address}/clients/a.txt").result().read("").result().value == b"hello, world"
    file.parent.rename(file.parent.parent / "moved")
    assert [blob.name for blob in storage.Client().get_bucket("bucket").list_blobs(prefix="moved")] == ["moved/a.txt"]
    assert {request.method for request in gs.requests() if "clients" in request.path} >= {"GET", "PUT", "POST", "DELETE"}


def test_what_the_store_refuses(gs):
    from google.api_core import exceptions
    from google.cloud import storage

    gs.answer(("PUT|POST", 403))
    with pytest.raises(Exception, match="403"):
        (epath.Path(gs.address) / "forbidden").write_text("hello")
    assert not (epath.Path(gs.address) / "forbidden").exists()
    with pytest.raises(exceptions.NotFound, match="The specified bucket other does not exist"):
        storage.Client().get_bucket("other")

"""The page to play with: its pictures are those of the sampler, and its server answers on this machine alone."""

import base64
import http.client
import io
import json
import shutil
import threading
import time
import urllib.parse

import jax
import numpy as np
import pytest
import small
from PIL import Image

import repae_jax
from repae_jax.demo import __main__ as demo
from repae_jax.demo.server import make_server
from repae_jax.demo.studio import Studio, latent_colors
from repae_jax.job import build
from repae_jax.sampling.stepwise import Point, Stepper
from repae_jax.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with two checkpoints of different random weights, and a third in later/, outside of it."""
    job = build.build(build.plain_config(small.config()), jax.devices()[:1])
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder) as checkpointer:
        for step in (2, 4, 6):
            data_state = {"loader": {}, "inputs": {"frozen_vae": None}}
            checkpointer.save(step, small.random_state(job, seed=step), data_state, job.config)
    (folder / "later").mkdir()
    shutil.move(folder / "checkpoints" / "6", folder / "later" / "6")
    return folder


@pytest.fixture(scope="module")
def served(workdir):
    with make_server(Studio(str(workdir)), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server, address, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=120)
    connection.request("GET", address, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, json.loads(body) if answer.headers["Content-Type"] == "application/json" else body.decode()


def sample(server, **fields):
    return fetch(server, "/api/sample?" + urllib.parse.urlencode(fields))


def pixels(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_the_page_needs_nothing_from_elsewhere(served):
    answer, page = fetch(served, "/")
    assert answer.status == 200 and "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for address in ("/../server.py", "/%2e%2e/server.py", "//[", "/api/sample/../../etc/passwd"):
        assert fetch(served, address)[0].status == 404
    assert "https://" not in page and "http://" not in page and page.startswith("<!doctype html>")
    assert fetch(served, "/favicon.ico")[0].status == 404


@pytest.mark.integration
def test_pictures_are_the_samplers(served, workdir):
    settings = {"sampler": "heun", "steps": 4, "guidance_scale": 2.0, "guidance_low": 0.3, "guidance_high": 0.8}
    answer, content = sample(served, labels="3,5", seed=7, points=3, checkpoints="2,4", **settings)
    assert answer.status == 200, content
    assert [result["step"] for result in content["results"]] == [2, 4]
    shown = [np.stack(list(map(pixels, result["images"]))).astype(int) for result in content["results"]]
    expected = repae_jax.load_model(workdir, 4, device=jax.devices()[0]).sample([3, 5], seed=7, **settings)
    assert np.abs(shown[1] - expected).max() <= 1 and np.mean(shown[1] != expected) < 0.01
    assert np.abs(shown[0] - shown[1]).max() > 20  # other weights
    for result, images in zip(content["results"], shown):
        way = result["trajectory"]
        assert [point["t"] for point in way] == [1.0, 0.5, 0.0]
        assert np.array_equal(pixels(way[-1]["image"]), images[0])
        assert pixels(way[0]["latents"]).shape == (4, 4, 3)
    noise = [pixels(result["trajectory"][0]["latents"]) for result in content["results"]]
    assert noise[0].shape == noise[1].shape


@pytest.mark.integration
def test_two_browsers_at_the_same_time(workdir):
    """Each has the pictures that it would have alone, also where both ask for programs and models that nobody had asked for."""
    asked = [
        {"labels": "3", "seed": 1, "checkpoints": "2,4"},
        {"labels": "5", "seed": 2, "checkpoints": "4", "sampler": "heun"},
        {"labels": "5", "seed": 1, "checkpoints": "2", "guidance_scale": 2},
    ]
    together, begin = {}, threading.Barrier(2)
    with make_server(Studio(str(workdir)), "127.0.0.1", 0) as server:
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()

        def browse(name, requests):
            begin.wait()
            together[name] = [sample(server, steps=2, points=2, **request) for request in requests]

        browsers = [threading.Thread(target=browse, args=given) for given in (("a", asked), ("b", asked[::-1]))]
        for browser in browsers:
            browser.start()
        for browser in browsers:
            browser.join(120)
        server.shutdown()
        serving.join()
    assert all(answer.status == 200 for answers in together.values() for answer, _ in answers), together
    alone = Studio(str(workdir))
    for answers, requests in ((together["a"], asked), (together["b"], asked[::-1])):
        for (_, content), request in zip(answers, requests):
            fields = {name: str(value) for name, value in {"steps": 2, "points": 2, **request}.items()}
            assert content["results"] == alone.sample(alone.parse(fields), lambda: True)["results"]


@pytest.mark.integration
def test_newer_checkpoints_are_found(served, workdir):
    _, before = fetch(served, "/api/run")
    assert before["checkpoints"] == [2, 4] and before["classes"] == 10
    assert before["samplers"] == ["euler", "heun", "sde", "dpmpp", "dopri5"]
    shutil.move(workdir / "later" / "6", workdir / "checkpoints" / "6")
    try:
        assert fetch(served, "/api/run")[1]["checkpoints"] == [2, 4, 6]
        _, content = sample(served, labels="0", steps=2, sampler="euler", guidance_scale=1)
        assert [result["step"] for result in content["results"]] == [6]
    finally:
        shutil.move(workdir / "checkpoints" / "6", workdir / "later" / "6")
    answer, content = sample(served, labels="0", steps=2, checkpoints="6")
    assert answer.status == 400 and content["error"] == "there is no checkpoint of step 6; there are 2, 4"


@pytest.mark.integration
def test_nobody_computes_for_a_browser_that_has_left(served, monkeypatch, capsys):
    ended = threading.Event()
    taken = []

    def steps(self, *_):
        for i in range(10_000):
            taken.append(i)
            time.sleep(0.01)
            yield Point(1.0, np.zeros((1, 4, 4, 4), np.float32))
        ended.set()

    monkeypatch.setattr(Stepper, "steps", steps)
    connection = http.client.HTTPConnection("127.0.0.1", served.server_port)
    connection.request("GET", "/api/sample?labels=0")
    while not taken:
        time.sleep(0.01)
    connection.close()
    before = 0
    while len(taken) > before:  # until no more steps are taken
        before = len(taken)
        time.sleep(1)
    assert not ended.is_set()
    assert fetch(served, "/api/run")[0].status == 200
    assert "Traceback" not in capsys.readouterr().err


def test_broken_weights_are_one_line(served, monkeypatch):
    monkeypatch.setattr(Stepper, "steps", lambda self, *_: iter([Point(0.0, np.full((1, 4, 4, 4), np.nan, np.float32))]))
    answer, content = sample(served, labels="0", checkpoints="4")
    assert answer.status == 400 and "the samples of step 4 are not finite: training has diverged" in content["error"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "number of labels 0 must lie in [1, 16]"),
        ({"labels": "10"}, "label 10 must lie in [0, 9]"),
        ({"labels": "x"}, "labels 'x' is no whole number"),
        ({"labels": "1", "steps": "1e9"}, "steps '1e9' is no whole number"),
        ({"labels": "1", "steps": "5000"}, "steps 5000 must lie in [1, 1000]"),
        ({"labels": "1", "guidance_scale": "nan"}, "guidance_scale=nan"),
        ({"labels": "1", "guidance_low": "0.9", "guidance_high": "0.1"}, "guidance interval [0.9, 0.1]"),
        ({"labels": "1", "sampler": "ancestral"}, "sampler 'ancestral': the network predicts a velocity"),
        ({"labels": "1", "seed": "-1"}, "seed -1"),
        ({"labels": "1", "points": "99"}, "points 99 must lie in [2, 12]"),
        ({"labels": "1", "checkpoints": "3"}, "there is no checkpoint of step 3; there are 2, 4"),
        ({"labels": "1", "speed": "3"}, "unknown: speed; allowed: checkpoints,"),
        ({"labels": "1", "checkpoints": "1,2,3,4,5"}, "number of checkpoints 5 must lie in [1, 4]"),
        ({"labels": "9" * 5000}, "is no whole number"),
        ({"labels": ",".join("1" * 17)}, "number of labels 17 must lie in [1, 16]"),
    ],
)
def test_wrong_requests_are_one_line(served, fields, message):
    answer, content = sample(served, **fields)
    assert answer.status == 400 and message in content["error"] and "\n" not in content["error"]


def test_other_machines_are_refused(served):
    for host in ("evil.example", "evil.example:8000", "", "[", "localhost.evil.example", "127.0.0.1@evil.example"):
        answer, content = fetch(served, "/api/run", Host=host)
        assert answer.status == 403 and "this machine alone" in content["error"]
    for site in ("cross-site", "same-site"):  # as browsers say of what pages of other servers ask for
        assert fetch(served, "/api/sample?labels=0", **{"Sec-Fetch-Site": site})[0].status == 403
        assert fetch(served, "/", **{"Sec-Fetch-Site": site})[0].status == 200
    assert fetch(served, "/api/run", Host="localhost:1234")[0].status == 200
    assert demo.parse_args(["runs/repae"]).host == "127.0.0.1"


def test_few_channels_are_shades_of_gray():
    latents = np.asarray([-2.0, 0.0, 1.0, 2.0]).reshape(1, 2, 2, 1)
    assert latent_colors(latents).tolist() == [[[[0] * 3, [128] * 3], [[191] * 3, [255] * 3]]]


def end_of(*words):
    with pytest.raises(SystemExit) as ended:
        demo.main(list(map(str, words)))
    return str(ended.value.code)


def test_nothing_to_serve(tmp_path, served, workdir):
    (tmp_path / "checkpoints").mkdir()
    assert "has no checkpoint to sample from: give the --workdir of a run that has written one" in end_of(tmp_path)
    assert "is no local path" in end_of("nobody/nothing") or "does not exist" in end_of("nobody/nothing")
    with pytest.raises(ValueError, match="cannot be had .*choose another --port"):
        make_server(None, "127.0.0.1", served.server_port)
    with pytest.raises(ValueError, match="--host is empty"):
        make_server(None, "", 0)

"""The roll call of processes started by hand: in any order, and what is wrong with them."""

import json
import re
import socket
import threading
import time

import pytest
from jax_internals import private
from peers import free_address

from repae_jax.distributed import multihost, roll_call


def test_a_port_that_is_in_use():
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        with pytest.raises(
            ValueError, match=rf"--coordinator={address}: process 0 cannot use this port \(.*; give another one"
        ):
            multihost.start(False, address, 2, 0)


def roll_of(*numbers, count=3):
    """Answers of `call_roll` to processes that come one after the other; None for success."""
    address, answers = free_address(), {}

    def come(key, index, of):
        try:
            answers[key] = roll_call.call_roll(address, of, index)
        except ValueError as error:
            answers[key] = str(error).replace(address, "ADDRESS")

    threads = []
    for key, number in enumerate(numbers):
        index, of = number if isinstance(number, tuple) else (number, count)
        threads.append(threading.Thread(target=come, args=(key, index, of), daemon=True))
        threads[-1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(10)
    return [answers.get(key, "still waiting") for key in range(len(numbers))]


def test_two_first_processes_fail_at_once():
    """Both: the port is in use for the second, and the first need not wait for one that will not come."""
    address, errors = free_address(), []

    def come():
        with pytest.raises(ValueError) as caught:
            roll_call.call_roll(address, 2, 0)
        errors.append(str(caught.value))

    first = threading.Thread(target=come, daemon=True)
    first.start()
    time.sleep(0.5)
    with pytest.raises(ValueError, match=r"process 0 cannot use this port \(.*--process_id of its own"):
        multihost.start(False, address, 2, 0)
    first.join(5)
    assert errors and "have the same number" in errors[0]


def test_processes_of_one_run_come_in_any_order():
    assert roll_of(2, 0, 1) == [None] * 3


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1, 1), r"process 1 of 3 on host \S+ \(pid \d+\) and process 1 of 3 on host \S+ \(pid \d+\) have the same number"),
        ((0, (1, 4)), r"process 1 of 4 on host \S+ \(pid \d+\) has come to a run of 3 processes"),
    ],
)
def test_processes_of_different_runs_all_fail_at_once(numbers, message):
    answers = roll_of(*numbers)
    assert len(set(answers)) == 1
    assert re.fullmatch(f"--coordinator=ADDRESS: {message}. Give each process of a run .*", answers[0])


def test_a_process_may_end_and_come_again():
    """While others are waited for."""
    address = free_address()
    host, port = address.split(":")
    threads = [threading.Thread(target=roll_call.call_roll, args=(address, 3, 0), daemon=True)]
    threads[0].start()
    time.sleep(0.3)
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(json.dumps({"process": 1, "of": 3, "host": "a", "pid": 1}).encode() + b"\n")
        time.sleep(0.3)
    with socket.create_connection((host, int(port))) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
    for index in (2, 1):  # all numbers have come before the one that has gone comes again
        threads.append(threading.Thread(target=roll_call.call_roll, args=(address, 3, index), daemon=True))
        threads[-1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_process_that_comes_to_a_run_that_has_begun():
    """It leaves that alone: JAX would end it."""
    address = free_address()
    service = private("lib", "_jax").get_distributed_runtime_service(address, 2)
    try:
        with pytest.raises(ValueError, match=f"--coordinator={address}: a run has begun there already, or something else"):
            roll_call.call_roll(address, 2, 1)
    finally:
        service.shutdown()

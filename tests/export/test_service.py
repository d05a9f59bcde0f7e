"""The example of a service: right answers, whatever the other clients send."""

import asyncio
import importlib.util
import io
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Event, Thread

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline

from skltl import CNNFeatureTransformer, export_onnx, make_feature_pipeline

for name in ("onnxruntime", "onnxscript", "starlette"):
    pytest.importorskip(name)
onnx = pytest.importorskip("onnx")
uvicorn = pytest.importorskip("uvicorn")

SCRIPT = Path(__file__).parents[2] / "examples" / "serve_onnx.py"

COLORS = ("cyan", "magenta", "yellow")

MAX_BYTES = 1_000_000

# Most that the service may need after the first 100 requests: allocators are not exact.
MOST_MORE_MEMORY = 30 * 2**20

N_CLIENTS = 8

# Seconds after which an answer is missing. It decides nothing else.
PATIENCE = 20


def colored_images(n, shape, seed=0):
    """Noisy images (n, h, w, 3), each without most of one channel, and its color."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *shape, 3), dtype=np.uint8)
    channels = np.arange(n) % 3
    for image, channel in zip(images, channels, strict=True):
        image[..., channel] //= 3
    return images, np.array(COLORS)[channels]


def encoded(image, kind, **options):
    """Return an image as the content of a file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind, **options)
    return stream.getvalue()


def bomb():
    """Return a small PNG file whose header announces 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def good_files():
    """Contents of files that are images of 8 bits."""
    images, _ = colored_images(3, (240, 320), seed=1)
    frames = [Image.fromarray(image) for image in images[1:]]
    return [
        *(encoded(image, "JPEG", quality=95) for image in images),
        *(encoded(image, "PNG") for image in images),
        encoded(images[0], "GIF", save_all=True, append_images=frames),
    ]


def bad_files():
    """Contents by name, each with the status and the reason of its refusal."""
    (image,), _ = colored_images(1, (240, 320))
    deep = image[..., 0].astype(np.uint16) * 257
    return {
        "truncated": (encoded(image, "JPEG")[:-5000], 400, "truncated"),
        "text": (b"a list of trees", 400, "it is not a JPEG, PNG"),
        "empty": (b"", 400, "empty"),
        "16 bits": (encoded(deep, "PNG"), 400, "other than 8 bits"),
        "bomb": (bomb(), 400, "2,500,000,000 pixels, more than the limit of 50,"),
        "too large": (bytes(MAX_BYTES + 200_000), 413, "more than 1,000,000 bytes"),
    }


@dataclass
class Server:
    """A running service: its port; its process, and what that logs, if it has one."""

    port: int
    pid: int = 0
    log: Path = Path()

    def request(self, method, path, content=None):
        """Return the status, the answer and the headers of a response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with closing(connection):
            connection.request(method, path, content)
            response = connection.getresponse()
            return response.status, json.loads(response.read()), response.headers

    def post(self, content):
        """Send a file; return the status and the answer."""
        return self.request("POST", "/predict", content)[:2]

    def post_all(self, contents):
        """Send files from several clients at a time."""
        with ThreadPoolExecutor(N_CLIENTS) as clients:
            return list(clients.map(self.post, contents))

    @contextmanager
    def upload(self, *headers):
        """Begin an upload, whose body is still to be sent."""
        address = ("127.0.0.1", self.port)
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            lines = ["POST /predict HTTP/1.1", "Host: localhost", *headers, "", ""]
            connection.sendall("\r\n".join(lines).encode())
            yield connection

    def memory(self):
        """Return the bytes that the process holds; 0 where that is unknown."""
        if sys.platform != "linux":
            return 0
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])


def answer_on(connection):
    """Receive a response; return its status and the answer."""
    response = HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


@contextmanager
def serving(path, folder, *options):
    """Run the example on a free port; it must end cleanly, and log no traceback."""
    log = folder / "stderr.txt"
    command = [sys.executable, str(SCRIPT), str(path), "--port", "0", *options]
    with log.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    try:
        pattern = r"running on http://127.0.0.1:(\d+)"
        yield Server(int(logged(log, pattern)[1]), process.pid, log)
        process.terminate()
        process.wait(PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text(), log.read_text()
    if os.name == "posix":  # elsewhere, a process is ended without notice
        assert "Application shutdown complete" in log.read_text(), log.read_text()


def logged(log, pattern):
    """Wait until a process has logged something."""
    deadline = time.monotonic() + 3 * PATIENCE
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{pattern!r} was not logged: {log.read_text()}")


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("serve_onnx", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline():
    """A fitted pipeline with string classes."""
    images, colors = colored_images(30, (40, 48))
    settings = {"layer": "block3", "precision": "float32"}
    return make_feature_pipeline("tiny", "softmax", **settings).fit(images, colors)


@pytest.fixture(scope="module")
def model_file(pipeline, tmp_path_factory):
    """The pipeline, exported."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export_onnx(pipeline, path)
    return path


@pytest.fixture(scope="module")
def server(model_file, tmp_path_factory):
    """The service of the pipeline."""
    folder = tmp_path_factory.mktemp("service")
    with serving(model_file, folder, "--max-bytes", str(MAX_BYTES)) as server:
        yield server


def assert_answer(answer, pipeline, content):
    """Compare an answer with what the pipeline predicts for the same file."""
    (proba,) = pipeline.predict_proba([content])
    assert answer["class"] == pipeline.predict([content])[0]
    assert list(answer["probabilities"]) == list(COLORS)
    found = list(answer["probabilities"].values())
    np.testing.assert_allclose(found, proba, atol=1e-3)


# Answers


def test_answers_are_predictions_of_the_pipeline(server, pipeline):
    answers = [server.post(content) for content in good_files()]

    for (status, answer), content in zip(answers, good_files(), strict=True):
        assert status == 200, answer
        assert_answer(answer, pipeline, content)
    assert len({answer["class"] for _, answer in answers}) > 1


SMALL = {"layer": "block1", "image_size": 32, "precision": "float32"}


@pytest.fixture
def answers_of(example, tmp_path):
    """A function: fit a model, export it, and return its answers and what it is."""
    images, _ = colored_images(12, (32, 32))
    contents = [encoded(image, "PNG") for image in images[:3]]

    def answers_of(model, y, method):
        model.fit(images, y)
        export_onnx(model, tmp_path / "model.onnx")
        served = example.Model(str(tmp_path / "model.onnx"))
        answers = served.predict([served.crop(content) for content in contents])
        assert json.loads(json.dumps(answers)) == answers
        return answers, getattr(model, method)(contents)

    return answers_of


def test_without_probabilities_there_are_scores(answers_of):
    model = make_feature_pipeline("tiny", "svm", **SMALL)

    answers, expected = answers_of(model, [0, 1, 1] * 4, "decision_function")

    assert [answer["class"] for answer in answers] == [0, 1, 1]
    scores = [answer["scores"] for answer in answers]
    assert [list(one) for one in scores] == [["1"]] * 3
    found = [one["1"] for one in scores]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_multilabel_targets_have_a_list_of_labels(answers_of):
    model = make_feature_pipeline("tiny", "ovr", **SMALL)
    indicators = np.array([[0, 1], [1, 1], [1, 0]] * 4)

    answers, expected = answers_of(model, indicators, "predict_proba")

    assert [answer["labels"] for answer in answers] == [[1], [0, 1], [0]]
    found = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_regressors_have_values(answers_of):
    model = make_pipeline(CNNFeatureTransformer("tiny", **SMALL), Ridge())

    answers, expected = answers_of(model, [0.0, 2.5, 7.5] * 4, "predict")

    found = [answer["values"] for answer in answers]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_a_file_without_metadata_is_refused(example, tmp_path):
    helper = onnx.helper
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
        for name in ("images", "values")
    ]
    node = helper.make_node("Identity", ["images"], ["values"])
    graph = helper.make_graph([node], "other", ends[:1], ends[1:])
    opset = helper.make_opsetid("", 20)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")

    with pytest.raises(ValueError, match="was not written by skltl.export_onnx"):
        example.Model(str(tmp_path / "other.onnx"))


def test_neither_torch_nor_sklearn_is_imported(model_file):
    code = (
        "import runpy, sys; "
        f"example = runpy.run_path({str(SCRIPT)!r}); "
        f"model = example['Model']({str(model_file)!r}); "
        "answers = model.predict([model.crop(sys.stdin.buffer.read())]); "
        "print(answers[0]['class'], {'torch', 'sklearn', 'scipy'} & {*sys.modules})"
    )

    done = subprocess.run(
        [sys.executable, "-c", code],
        input=good_files()[0],
        capture_output=True,
        check=True,
    )

    assert done.stdout.decode().split() == ["cyan", "set()"]


# Many clients


def test_many_clients_get_right_answers_from_constant_memory(server, pipeline):
    good, bad = good_files(), bad_files()
    expected = dict(
        enumerate(
            zip(pipeline.predict(good), pipeline.predict_proba(good), strict=True)
        )
    )
    kinds = [*expected, *expected, *bad] * 25
    random.Random(0).shuffle(kinds)
    contents = [good[kind] if kind in expected else bad[kind][0] for kind in kinds]
    server.post_all(contents[-100:])  # allocates
    before = server.memory()

    answers = server.post_all(contents)

    assert len(contents) >= 500
    for kind, (status, answer) in zip(kinds, answers, strict=True):
        if kind in expected:
            label, proba = expected[kind]
            assert (status, answer.get("class")) == (200, label), answer
            found = list(answer["probabilities"].values())
            np.testing.assert_allclose(found, proba, atol=1e-3)
        else:
            _, expected_status, reason = bad[kind]
            assert status == expected_status, (kind, answer)
            assert reason in answer["error"], kind
    assert server.memory() - before < MOST_MORE_MEMORY


def test_clients_that_go_away_do_not_disturb_others(server, pipeline):
    content = good_files()[0]
    length = f"Content-Length: {len(content)}"
    for n_sent in (0, 100, len(content)) * 3:
        with server.upload(length) as connection:
            connection.sendall(content[:n_sent])

    status, answer = server.post(content)

    assert status == 200
    assert_answer(answer, pipeline, content)


def test_slow_uploads_do_not_block_others(server):
    with ExitStack() as uploads:
        for _ in range(12):
            slow = uploads.enter_context(server.upload("Content-Length: 1000"))
            slow.sendall(b"some bytes")

        statuses = [server.post(content)[0] for content in good_files()]

    assert statuses == [200] * len(statuses)


def test_a_slow_upload_ends_with_408(model_file, tmp_path):
    with (
        serving(model_file, tmp_path, "--max-seconds", "0.5") as server,
        server.upload("Content-Length: 200") as connection,
    ):
        while not select.select([connection], [], [], 0.1)[0]:
            connection.sendall(b"x")
        status, answer = answer_on(connection)

    assert (status, answer) == (
        408,
        {"error": "the upload took more than 0.5 seconds"},
    )


def test_a_huge_upload_neither_blocks_others_nor_takes_memory(server):
    chunk = b"%x\r\n%b\r\n" % (2**16, bytes(2**16))
    before, others_done = server.memory(), Event()

    def send(connection):
        n_chunks = 0
        while n_chunks < 1000 or not others_done.is_set():
            connection.sendall(chunk)
            n_chunks += 1
        memory = server.memory()
        connection.sendall(b"0\r\n\r\n")
        return memory

    with (
        ThreadPoolExecutor(1) as threads,
        server.upload("Transfer-Encoding: chunked") as connection,
    ):
        connection.sendall(chunk)
        sending = threads.submit(send, connection)
        try:
            statuses = [server.post(content)[0] for content in good_files()]
        finally:
            others_done.set()
        memory = sending.result()
        status, answer = answer_on(connection)

    assert statuses == [200] * len(statuses)
    assert (status, answer["error"]) == (413, "it has more than 1,000,000 bytes")
    assert memory - before < MOST_MORE_MEMORY


def test_the_length_of_an_upload_is_not_believed(server):
    chunk = b"%x\r\n%b\r\n" % (MAX_BYTES + 1, bytes(MAX_BYTES + 1))
    headers = ("Content-Length: 10", "Transfer-Encoding: chunked")
    with server.upload(*headers) as connection:
        connection.sendall(chunk + b"0\r\n\r\n")
        status, _ = answer_on(connection)

    assert status == 413


def test_the_largest_upload_is_accepted(server):
    # As large as is permitted, and no image.
    assert server.post(b"x" * MAX_BYTES)[0] == 400
    assert server.post(b"x" * (MAX_BYTES + 1))[0] == 413


def test_a_client_that_asks_before_it_sends_is_refused_at_once(server):
    headers = (f"Content-Length: {MAX_BYTES + 1}", "Expect: 100-continue")
    with server.upload(*headers) as connection:
        status, _ = answer_on(connection)

    assert status == 413


@pytest.mark.skipif(os.name != "posix", reason="processes are ended without notice")
def test_a_service_that_ends_still_answers_the_uploads_in_flight(
    model_file, pipeline, tmp_path
):
    content = good_files()[0]
    headers = (f"Content-Length: {len(content)}", "Expect: 100-continue")
    with (
        serving(model_file, tmp_path) as server,
        server.upload(*headers) as connection,
    ):
        assert b"100" in connection.recv(1000)
        os.kill(server.pid, signal.SIGTERM)
        logged(server.log, "Waiting for connections to close")
        connection.sendall(content)
        status, answer = answer_on(connection)

    assert status == 200
    assert_answer(answer, pipeline, content)


# The application, with another model


@dataclass
class Stub:
    """A model whose answers are the uploads, unless `crop` does something else."""

    crop: object = bytes

    def predict(self, crops):
        return [{"class": crop.decode()} for crop in crops]


@contextmanager
def serving_here(example, model, max_waiting=64):
    """Run the application in a thread of this process."""
    service = example.Service(model, 16, max_waiting, n_decoders=1)
    app = example.make_app(service, MAX_BYTES, PATIENCE)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Server(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def test_a_full_service_refuses_with_503_and_answers_those_that_wait(example):
    decoding, proceed = Event(), Event()

    def crop(content):
        decoding.set()
        proceed.wait(PATIENCE / 2)
        return bytes(content)

    model = Stub(crop)
    with serving_here(example, model, 1) as server, ThreadPoolExecutor(1) as client:
        first = client.submit(server.post, b"first")
        assert decoding.wait(PATIENCE)
        health = server.request("GET", "/health")
        refused = server.request("POST", "/predict", b"second")
        proceed.set()
        answers = [first.result(), server.post(b"third")]

    assert health[:2] == (200, {"status": "ok", "waiting": 1})
    assert refused[:2] == (503, {"error": "too many requests wait"})
    assert int(refused[2]["Retry-After"]) > 0
    assert answers == [(200, {"class": "first"}), (200, {"class": "third"})]


def test_other_errors_are_500_without_details(example):
    def crop(content):
        raise RuntimeError("a secret")

    with serving_here(example, Stub(crop)) as server:
        answer = server.post(b"image")
        health = server.request("GET", "/health")

    assert answer == (500, {"error": "internal error"})
    assert health[:2] == (200, {"status": "ok", "waiting": 0})


def test_other_paths_and_methods_are_refused(example):
    with serving_here(example, Stub()) as server:
        paths = ("/predict", "/other")
        statuses = [server.request("GET", path)[0] for path in paths]

    assert statuses == [405, 404]


# The queue


def run_queue(example, run, n_items, max_batch_size, canceled=()):
    """Queue items while the first one is running; return all results or exceptions."""
    running, proceed = Event(), Event()

    def waiting_run(items):
        running.set()
        assert proceed.wait(PATIENCE)
        return run(items)

    async def results():
        queue = example.BatchQueue(waiting_run, max_batch_size)
        tasks = [asyncio.create_task(queue.result(0))]
        await asyncio.to_thread(running.wait, PATIENCE)
        tasks += [asyncio.create_task(queue.result(item)) for item in range(1, n_items)]
        await asyncio.sleep(0)  # all are queued
        for position in canceled:
            tasks[position].cancel()
        proceed.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        queue.thread.shutdown()
        return found

    return asyncio.run(results())


def test_items_that_wait_together_are_one_batch(example):
    batches = []

    def run(items):
        batches.append(list(items))
        return [10 * item for item in items]

    results = run_queue(example, run, n_items=6, max_batch_size=3)

    assert batches == [[0], [1, 2, 3], [4, 5]]
    assert results == [0, 10, 20, 30, 40, 50]


def test_an_error_is_that_of_all_items_of_its_batch_only(example):
    error = ValueError("bad batch")

    def run(items):
        if 2 in items:
            raise error
        return items

    results = run_queue(example, run, n_items=5, max_batch_size=2)

    assert results == [0, error, error, 3, 4]


def test_a_canceled_request_does_not_disturb_its_batch(example):
    results = run_queue(example, list, n_items=4, max_batch_size=8, canceled=[0, 2])

    assert [results[1], results[3]] == [1, 3]
    assert all(isinstance(results[n], asyncio.CancelledError) for n in (0, 2))

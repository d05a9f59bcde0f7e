"""
Predictions over HTTP, without torch and scikit-learn
=====================================================

Serve a model that was written by ``skltl.export_onnx``. Of skltl, only the part that
decodes images is imported.

    pip install --no-deps skltl
    pip install numpy pillow onnxruntime starlette uvicorn
    python serve_onnx.py model.onnx --port 8000
    curl --data-binary @image.jpg http://localhost:8000/predict

The body of a request is an image file. The response is JSON: of a classifier
``{"class": ..., "probabilities": {class: probability, ...}}``, or ``"scores"`` if it
has no probabilities; for multilabel targets there is a list of ``"labels"`` instead of
``"class"``; of a regressor ``{"values": ...}``. A refused request has the status 4xx or
503, and the reason as ``{"error": ...}``. ``GET /health`` has the status 200 as long as
the service responds.

The size and the duration of an upload, the pixels of an image, and the numbers of
connections and of waiting requests are limited; ``--help`` lists the options. There is
neither encryption nor authentication: on a public network, run the service behind a
proxy that has both.
"""

import argparse
import asyncio
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import numpy as np
import onnxruntime
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Route

from skltl import Preprocessing, crop_images
from skltl.exceptions import ImageReadError, ImageTypeError

# After an upload that is refused, no other request is expected on its connection.
CLOSE = {"Connection": "close"}


class Model:
    """A file of ``export_onnx``: from the bytes of images to answers.

    Parameters
    ----------
    path : str
        File to load.
    n_threads : int, default=0
        Number of threads of ONNX Runtime; 0 is the number of cores.

    Raises
    ------
    ValueError
        If the file has no metadata of skltl.
    """

    def __init__(self, path, n_threads=0):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = n_threads
        # Threads that wait actively would take the cores from those that decode.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.names = [output.name for output in self.session.get_outputs()]
        metadata = self.session.get_modelmeta().custom_metadata_map
        if "preprocessing" not in metadata:
            raise ValueError(f"{path} was not written by skltl.export_onnx.")
        self.preprocessing = Preprocessing(**json.loads(metadata["preprocessing"]))
        self.classes = json.loads(metadata["classes"])

    def crop(self, content):
        """Decode an image file, resize and crop it: (height, width, n_channels)."""
        try:
            (crop,) = crop_images([content], self.preprocessing)
        except (ImageReadError, ImageTypeError) as error:
            raise HTTPException(400, error.reason) from error
        if crop.dtype != np.uint8:
            raise HTTPException(400, "it has other than 8 bits per channel; convert it")
        return crop

    def predict(self, crops):
        """Return the answers for a list of crops, which are one batch."""
        outputs = self.session.run(self.names, {"images": np.stack(crops)})
        rows = zip(*outputs, strict=True)
        return [self.answer(dict(zip(self.names, row, strict=True))) for row in rows]

    def answer(self, outputs):
        """Return the answer for one image as JSON types, from its outputs by name."""
        if "values" in outputs:
            return {"values": outputs["values"].tolist()}
        if "labels" in outputs:
            present = np.flatnonzero(outputs["labels"])
            answer = {"labels": [self.classes[index] for index in present]}
        else:
            answer = {"class": self.classes[outputs["index"]]}
        name = "probabilities" if "probabilities" in outputs else "scores"
        values = np.atleast_1d(outputs[name]).tolist()
        # Two classes may have a single score, which is that of the second class.
        classes = map(str, self.classes[-len(values) :])
        return answer | {name: dict(zip(classes, values, strict=True))}


class BatchQueue:
    """Run a function for all items that wait, as one batch, in a thread of its own.

    An item that finds the thread idle is a batch of one item, at once. Those that
    arrive while a batch is running wait for its end, and are the next batch. Thus
    batches become larger with the load, and no item waits for a batch to be filled.

    Parameters
    ----------
    run : callable
        Function from a list of items to a list of their results.
    max_batch_size : int
        Maximum number of items in a batch; the others wait for another one.
    """

    def __init__(self, run, max_batch_size):
        self.run = run
        self.max_batch_size = max_batch_size
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._idle = asyncio.Lock()
        self._items = []  # of the last batch
        self._results = None  # its task, until it begins to run

    async def result(self, item):
        """Return the result of an item; raise the exception of its batch, if any."""
        if self._results is None or len(self._items) >= self.max_batch_size:
            self._items = []
            self._results = asyncio.create_task(self._run_batch(self._items))
        index = len(self._items)
        self._items.append(item)
        # If this request is canceled, the others of the batch are not.
        results = await asyncio.shield(self._results)
        return results[index]

    async def _run_batch(self, items):
        async with self._idle:  # in the order of the batches
            if items is self._items:
                self._results = None  # the next item begins another batch
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.thread, self.run, items)


class Service:
    """Decode uploads in a few threads, and predict them in batches.

    Parameters
    ----------
    model : Model
        Model to serve.
    max_batch_size : int
        Maximum number of images in a batch.
    max_waiting : int
        Maximum number of uploaded images that wait for an answer.
    n_decoders : int
        Number of decoding threads.
    """

    def __init__(self, model, max_batch_size, max_waiting, n_decoders):
        self.model = model
        self.max_waiting = max_waiting
        self.n_waiting = 0
        self.decoders = ThreadPoolExecutor(n_decoders, thread_name_prefix="decoder")
        self.batches = BatchQueue(model.predict, max_batch_size)

    async def answer(self, content):
        """Return the answer for an image file, or raise ``HTTPException``."""
        if self.n_waiting >= self.max_waiting:
            raise HTTPException(503, "too many requests wait", {"Retry-After": "1"})
        self.n_waiting += 1
        try:
            loop = asyncio.get_running_loop()
            crop = await loop.run_in_executor(self.decoders, self.model.crop, content)
            return await self.batches.result(crop)
        finally:
            self.n_waiting -= 1

    def close(self):
        """End the threads."""
        self.decoders.shutdown()
        self.batches.thread.shutdown()


async def read_upload(request, max_bytes, max_seconds):
    """Return the body of a request, or raise ``HTTPException``.

    Of a body that is too large, the rest is received but not stored: many clients read
    no response before they have sent all of it.
    """
    announced = int(request.headers.get("Content-Length", 0))
    too_large = HTTPException(413, f"it has more than {max_bytes:,} bytes", CLOSE)
    if announced > max_bytes and "Expect" in request.headers:
        raise too_large  # this client sends nothing before it is told to continue
    content = bytearray()
    try:
        async with asyncio.timeout(max_seconds):
            async for chunk in request.stream():
                if len(content) <= max_bytes:
                    content += chunk
    except ClientDisconnect:
        raise HTTPException(400, "the upload is incomplete") from None
    except TimeoutError:
        if len(content) <= max_bytes:
            reason = f"the upload took more than {max_seconds:g} seconds"
            raise HTTPException(408, reason, CLOSE) from None
    if len(content) > max_bytes:
        raise too_large
    return content


def make_app(service, max_bytes, max_seconds):
    """Return the ASGI application of a service, which it closes at the end.

    Parameters
    ----------
    service : Service
        Service to which the uploads are passed.
    max_bytes : int
        Maximum size of an upload.
    max_seconds : float
        Maximum duration of an upload.
    """

    async def predict(request):
        content = await read_upload(request, max_bytes, max_seconds)
        return JSONResponse(await service.answer(content))

    async def health(request):
        return JSONResponse({"status": "ok", "waiting": service.n_waiting})

    async def refuse(request, error):
        answer = {"error": error.detail}
        return JSONResponse(answer, error.status_code, headers=error.headers)

    async def fail(request, error):  # the server logs the error
        return JSONResponse({"error": "internal error"}, 500)

    @asynccontextmanager
    async def lifespan(app):
        yield
        service.close()

    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: refuse, Exception: fail},
        lifespan=lifespan,
    )


def parse_arguments():
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description="Serve a model that was written by skltl.export_onnx.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="file of skltl.export_onnx")
    add("--host", default="127.0.0.1", help="address; 0.0.0.0 is all networks")
    add("--port", type=int, default=8000, help="port; 0 is any free one")
    add("--max-bytes", type=int, default=10_000_000, help="size of an upload")
    add("--max-seconds", type=float, default=30, help="duration of an upload")
    add("--max-pixels", type=int, default=50_000_000, help="pixels of an image")
    add("--max-waiting", type=int, default=64, help="uploads that wait for an answer")
    add("--max-connections", type=int, default=200, help="connections at a time")
    add("--max-batch-size", type=int, default=16, help="images predicted together")
    add("--decoders", type=int, default=2, help="decoding threads")
    add("--threads", type=int, default=0, help="threads of the model; 0: all cores")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    # Python would keep the text of each warning about an odd file.
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = arguments.max_pixels
    service = Service(
        Model(arguments.model, arguments.threads),
        arguments.max_batch_size,
        arguments.max_waiting,
        arguments.decoders,
    )
    app = make_app(service, arguments.max_bytes, arguments.max_seconds)
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        http="h11",
        # It limits the uploads in memory, and responds with a 503 in plain text.
        limit_concurrency=arguments.max_connections,
    )


if __name__ == "__main__":
    main()

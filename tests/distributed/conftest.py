"""Clusters of two workers on this machine."""

import numpy as np
import pytest
import torch
from PIL import Image

N_IMAGES = 40


@pytest.fixture(scope="session")
def many_paths(tmp_path_factory):
    """Paths of 40 small images of noise."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(N_IMAGES):
        size = rng.integers(20, 60, 2)
        path = folder / f"image_{number:02}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return np.array(paths, dtype=object)


@pytest.fixture
def one_thread():
    """Let torch use one thread, as on workers."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def start_cluster():
    """Start a local cluster and return its client; it is stopped after the module."""
    distributed = pytest.importorskip("distributed", reason="needs skltl[dask]")
    started = []

    def start_cluster(n_workers=2, threads_per_worker=1):
        cluster = distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=threads_per_worker,
            dashboard_address=":0",
            memory_limit=0,
        )
        started.append(cluster)
        client = distributed.Client(cluster)
        started.append(client)
        return client

    yield start_cluster
    for one in reversed(started):
        one.close()


@pytest.fixture(scope="module")
def client(start_cluster):
    """Client of a cluster of two processes with a thread each."""
    return start_cluster()

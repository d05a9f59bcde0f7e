"""Fits in the processes of ``torchrun`` give what a fit in one process gives."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from numpy.testing import assert_allclose
from torchrun_cases import EQUAL, SEEDED, outcome

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
GUIDE = HERE.parents[1] / "docs" / "guide" / "fine_tuning.rst"

MEASURES = ("loss", "score", "validation_loss", "validation_score")


def torchrun(script, *arguments, cwd=None, options=(), seconds=300):
    """Run a script in two processes on this machine; return what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", *options, str(script), *map(str, arguments)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        # Processes that restart would read the addresses of those that have ended
        # (issue 135712 of pytorch).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"not finished: {process.communicate()[0][-3000:]}")
    assert process.returncode == 0, printed[-3000:]
    return printed


def results(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Let fits in this process use one thread, as those of the other processes do."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The outcome of each case, in both processes."""
    folder = tmp_path_factory.mktemp("torchrun")
    torchrun(HERE / "torchrun_cases.py", folder)
    one, other = results(folder)
    return {name: (one[name], other[name]) for name in one}


@pytest.mark.parametrize("name", EQUAL)
def test_the_losses_are_those_of_one_process(name, outcomes, tmp_path):
    found, other = outcomes[name]

    expected = outcome(EQUAL[name], tmp_path)

    assert "error" not in found, found
    assert len(found["history"]) == len(expected["history"])
    for record, plain in zip(found["history"], expected["history"], strict=True):
        measured = [record[measure] for measure in MEASURES if measure in plain]
        wanted = [plain[measure] for measure in MEASURES if measure in plain]
        assert_allclose(measured, wanted, rtol=1e-5, atol=1e-5)
    assert found["history"] == other["history"]


@pytest.mark.parametrize("name", [*EQUAL, *SEEDED])
def test_all_processes_end_with_the_same_bits(name, outcomes):
    found, other = outcomes[name]

    assert "error" not in found, found
    assert found["digest"] == other["digest"]
    assert found["history"] == other["history"]


def test_dropout_is_seeded_but_differs_from_one_process(outcomes, tmp_path):
    found, _ = outcomes["dropout"]

    expected = outcome(SEEDED["dropout"], tmp_path)

    assert found["history"][0]["loss"] != expected["history"][0]["loss"]


@pytest.mark.parametrize("name", ["read once", "crops once", "cached once"])
def test_each_image_is_read_by_one_process(name, outcomes):
    one, other = outcomes[name]

    assert "error" not in one, one
    assert sorted(one["read"] + other["read"]) == list(range(60))


ERRORS = {
    "an unreadable image": ("ImageReadError", "Image 35 "),
    "other labels": ("ValueError", "different y in process 1"),
    "other numbers": ("ValueError", "different numbers of images in process 1"),
    "other classes": ("ValueError", "different classes in process 1"),
    "only one is warm": ("ValueError", "different previous fits in process 1"),
    "other weights": ("ValueError", "different weights in process 1"),
    "invalid parameters": ("InvalidParameterError", "'batch_size' parameter"),
    "other parameters": ("ValueError", "different batch_size in process 1"),
    "an error": ("RuntimeError", "out of luck"),
    "divergence": ("TrainingError", "Training diverged"),
    "from scratch": ("ValueError", "batch-norms that are trained from scratch"),
    "an interruption": ("KeyboardInterrupt", ""),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_process_is_raised_in_all(name, outcomes):
    kind, message = ERRORS[name]

    for found in outcomes[name]:
        assert found["error"] == kind, found
        assert message in found["message"]


def test_an_error_says_which_process_has_raised_it(outcomes):
    one, other = outcomes["an unreadable image"]

    assert one["notes"] == ["It was raised in process 1 of 2."]
    assert other["notes"] == []


def test_a_signal_to_one_process_keeps_the_same_epoch_in_all(outcomes):
    one, other = outcomes["a signal"]

    assert "error" not in one, one
    assert len(one["history"]) == len(other["history"]) == 1
    assert one["digest"] == other["digest"]


@pytest.mark.parametrize(
    ("name", "category"),
    [("a signal", "InterruptionWarning"), ("an odd range", "ImageRangeWarning")],
)
def test_only_the_first_process_warns(name, category, outcomes):
    one, other = outcomes[name]

    assert one["warned"] == [category]
    assert other["warned"] == []


def test_only_the_first_process_shows_progress(outcomes):
    one, other = outcomes["progress"]

    assert "fine-tuning" in one["stderr"]
    assert other["stderr"] == ""


def test_the_processes_go_on_after_errors(outcomes):
    assert outcomes["still well"][0]["digest"] == outcomes["classes"][0]["digest"]


def test_a_fit_resumes_after_one_process_was_killed(outcomes, tmp_path):
    options = ["--max-restarts", "1"]

    torchrun(HERE / "torchrun_killed.py", tmp_path, options=options)

    one, other = results(tmp_path)
    expected, _ = outcomes["classes"]
    assert one["digest"] == other["digest"] == expected["digest"]
    assert one["losses"] == [record["loss"] for record in expected["history"]]
    assert one["n_steps"] == other["n_steps"] == 3 * 9  # two of five epochs were saved
    assert (one["n_saves"], other["n_saves"]) == (3, 0)  # only the first process
    assert list((tmp_path / "checkpoint").iterdir()) == []


def test_the_script_of_the_guide_runs(tmp_path):
    text = GUIDE.read_text().split("``train.py``")[1]
    indented = text.split(".. code-block:: python\n")[1].split("\n\nRun")[0]
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(indented))

    torchrun(script, cwd=tmp_path)

    assert (tmp_path / "classifier.joblib").exists()

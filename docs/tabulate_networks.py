"""Write ``guide/networks.csv``: networks are compared with their blocks and head.

Every network of torchvision, and one network of each module of timm, is built with
random weights, split into blocks and a head, and compared with itself, bit for bit, on
two random images of the usual size. This takes about half an hour, and 8 GB of memory.
"""

import csv
import sys
from pathlib import Path

import torch

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from every_network import TIMM, batch_for, build  # noqa: E402

from skltl.networks._torchvision import list_torchvision  # noqa: E402

COLUMNS = ("Network", "Layers", "Main layers", "Names of the main layers", "Equal bits")
MAX_CHARACTERS = 56


def as_text(names):
    """Return names as text, all of them if they are short."""
    text = ", ".join(names)
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{names[0]}, {names[1]}, ..., {names[-1]}"


def has_equal_bits(network, module, batch):
    """Return whether blocks and head compute what the module computes."""
    with torch.inference_mode():
        expected = module(batch.clone())
        found = network.logits(batch.clone())
    if not (torch.isfinite(expected).all() and expected.std() > 0):
        raise ValueError("The comparison is void: the output is constant or infinite.")
    return torch.equal(found.view(torch.int32), expected.view(torch.int32))


def row_of(name):
    """Return the row of a network; its memory is free afterwards."""
    network, module = build(name)
    is_equal = has_equal_bits(network, module, batch_for(name))
    mains = list(network.layers)
    counts = len(network.blocks), len(mains)
    return [name, *counts, as_text(mains), "yes" if is_equal else "no"]


def main():
    """Write the table, row by row."""
    names = [*list_torchvision(), *(f"timm:{name}" for name in TIMM)]
    with (DOCS / "guide" / "networks.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name in names:
            writer.writerow(row_of(name))
            file.flush()


if __name__ == "__main__":
    main()

"""A small vision transformer, as a backbone that is registered for all tests."""

import torch
from torchvision.models import VisionTransformer

from skltl import Backbone, Preprocessing

N_BLOCKS = 4
PATH = "encoder.layers.encoder_layer_{}"
LAYERS = {
    "stem": "encoder.dropout",
    **{f"block{n}": PATH.format(n - 1) for n in range(1, N_BLOCKS)},
    f"block{N_BLOCKS}": "encoder.ln",
}


def small_vit_module(n_classes=10, seed=0):
    """Return the network with weights that are drawn from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = VisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=N_BLOCKS,
            num_heads=2,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=n_classes,
        )
        torch.nn.init.normal_(network.heads.head.weight, std=0.5)
    return network


def small_vit(module=None, name="small_vit"):
    """Return a backbone of the network, whose first token is the class token."""
    return Backbone.from_module(
        name,
        small_vit_module() if module is None else module,
        preprocessing=Preprocessing(32),
        head="heads",
        layers=LAYERS,
        n_prefix_tokens=1,
    )

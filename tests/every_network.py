"""The networks that are compared with their blocks: torchvision's, one per timm module.

The names of timm are those of the smallest network of each of its modules.
"""

import timm
import torch

from skltl.networks import as_network, get_backbone

ONE_PER_MODULE = (
    *("beit_base_patch16_224", "halonet_h1", "mobileone_s0", "cait_xxs24_224"),
    *("coat_tiny", "convit_tiny", "convmixer_768_32", "convnext_atto"),
    *("cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s"),
    *("cspnext_tiny", "davit_tiny", "deepseek_vit_412m", "deit_tiny_patch16_224"),
    *("densenet121", "dla46x_c", "dpn48b", "edgenext_xx_small"),
    *("efficientformer_l1", "efficientformerv2_s0", "efficientnet_b0"),
    *("efficientvim_m1", "efficientvit_b0", "efficientvit_m0"),
    *("eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf"),
    *("gcvit_xxtiny", "gemma4_vit_167m", "ghostnet_050", "hardcorenas_b"),
    *("hgnetv2_b0", "hiera_tiny_224", "hieradet_small", "hrnet_w18_small"),
    *("iformer_t", "inception_next_atto", "inception_resnet_v2", "inception_v3"),
    *("inception_v4", "lcnetv2_small", "levit_128s", "lowformer_b0"),
    *("mambaout_femto", "maxvit_pico_rw_256", "poolformerv2_s12", "gmlp_ti16_224"),
    *("lcnet_035", "mobilenetv5_base", "mobilevit_xxs", "mvitv2_tiny"),
    *("naflexvit_base_patch16_parfac_gap", "nasnetalarge", "nest_tiny_jx"),
    *("nextvit_small", "nf_regnet_b0", "pit_ti_224", "pnasnet5large", "pvt_v2_b0"),
    *("qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvit_m1"),
    *("res2next50", "resnest14d", "resnet10t", "resnetv2_18", "rexnet_100"),
    *("selecsls42", "legacy_seresnet18", "sequencer2d_s", "shvit_s1", "skresnet18"),
    *("starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224"),
    *("swinv2_tiny_window16_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224"),
    *("tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small", "vgg11"),
    *("visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224"),
    *("vit_srelpos_small_patch16_224", "samvit_base_patch16_224"),
    *("vitamin_small_224", "volo_d1_224", "ese_vovnet19b_slim_dw"),
    *("legacy_xception", "xception41p", "xcit_nano_12_p16_224"),
)
# Those that this release of timm has, and a network with register tokens.
TIMM = tuple(
    name
    for name in (*ONE_PER_MODULE, "vit_small_patch16_dinov3")
    if timm.is_model(name)
)


def build(name):
    """Return the network of a backbone as blocks, and as the module that they are of.

    Weights that are zero at the start of a training could hide a mistake, so all biases
    and scales are changed.
    """
    backbone = get_backbone(name)
    size = backbone.preprocessing.size
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = backbone.build(None, size)
        for parameter in model.module.parameters():
            if parameter.ndim <= 1:
                parameter += 0.02 * torch.randn(parameter.shape)
    network = as_network(backbone, model, size)
    return network, model.module.eval()


def batch_for(name):
    """Return two images of random numbers, of the usual size."""
    generator = torch.Generator().manual_seed(1)
    size = get_backbone(name).preprocessing.size
    return torch.randn(2, 3, *size, generator=generator)

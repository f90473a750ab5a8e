"""Networks of timm for the coverage table: one or two of each family, random weights, the smallest sensible input."""

from functools import partial

import torch

from lightning_prune.reports.coverage import ZooModel

SECTION = "timm"

# Sides of the input in pixels.
CONVOLUTIONAL = {
    64: """
    cs3darknet_s cspresnet50 darknet53 densenet121 dla34 dpn48b ecaresnet26t efficientnet_lite0 ese_vovnet19b_dw
    fasternet_t0 fbnetv3_b gcresnext26ts gernet_s ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a hgnet_tiny
    hgnetv2_b0 hrnet_w18_small lcnet_050 lcnetv2_base legacy_seresnet18 legacy_xception mixnet_s mnasnet_small
    mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 nasnetalarge pnasnet5large regnety_002 regnetz_005
    repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t resnetblur18 resnetv2_50 rexnet_100
    selecsls42b skresnet18 starnet_s1 tf_efficientnetv2_b0 tinynet_e tresnet_m vgg11_bn vovnet39a xception41
    """,
    96: "inception_v3 inception_v4 inception_resnet_v2",
}
OTHER = {
    64: """
    caformer_s18 convformer_s18 convmixer_768_32 convnext_atto convnextv2_atto crossvit_tiny_240 csatv2 davit_tiny
    dm_nfnet_f0 eca_nfnet_l0 edgenext_xx_small efficientvim_m1 efficientvit_b0 efficientvit_m0 fastvit_t8
    focalnet_tiny_srf iformer_t inception_next_atto lambda_resnet26t lowformer_b0 mambaout_femto
    mobilenetv4_hybrid_medium mobilevit_xxs mobilevitv2_050 mvitv2_tiny nextvit_small nf_regnet_b0 nf_resnet26
    poolformer_s12 pvt_v2_b0 rdnet_tiny shvit_s1 swiftformer_xs tiny_vit_5m_224 twins_svt_small xcit_nano_12_p16_224
    """,
    224: """
    cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny deit_tiny_patch16_224 efficientformer_l1
    efficientformerv2_s0 eva02_tiny_patch14_224 gcvit_xxtiny hiera_tiny_224 levit_128s mixer_s32_224 nest_tiny
    pit_ti_224 resmlp_12_224 swin_tiny_patch4_window7_224 tnt_s_patch16_224 visformer_tiny vit_tiny_patch16_224
    """,
    256: "botnet26t_256 halonet26t swinv2_tiny_window8_256",
}


NARROW = {"mixnet_s": 0.32}
"""Networks of whose MACs about a quarter belongs to layers of which one width shrinks: depthwise, first and last."""


def timm_zoo() -> list[ZooModel]:
    """The networks; none where timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    found = []
    for most_macs, table in ((0.3, CONVOLUTIONAL), (1.0, OTHER)):
        for size, names in table.items():
            for name in names.split():
                build = partial(timm.create_model, name, pretrained=False)
                most = NARROW.get(name, most_macs)
                found.append(ZooModel(f"timm/{name}", SECTION, build, partial(_image, size), most_macs=most))
    return sorted(found, key=lambda entry: entry.name)


def _image(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size)

"""Networks of timm for the coverage table: one or two of each family, random weights, the smallest sensible input."""

from functools import partial

import torch

from lightning_prune.reports.coverage import ZooModel

SECTION = "timm"

# Sides of the input in pixels.
SIZES = {
    64: """
    cs3darknet_s cspresnet50 darknet53 densenet121 dla34 dpn48b ecaresnet26t efficientnet_lite0 ese_vovnet19b_dw
    fasternet_t0 fbnetv3_b gcresnext26ts gernet_s ghostnet_100 ghostnetv2_100 ghostnetv3_100 hardcorenas_a hgnet_tiny
    hgnetv2_b0 hrnet_w18_small lcnet_050 lcnetv2_base legacy_seresnet18 legacy_xception mixnet_s mnasnet_small
    mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 nasnetalarge pnasnet5large regnety_002 regnetz_005
    repghostnet_050 repvgg_a0 repvit_m0_9 res2net50_26w_4s resnest14d resnet10t resnetblur18 resnetv2_50 rexnet_100
    selecsls42b skresnet18 starnet_s1 tf_efficientnetv2_b0 tinynet_e tresnet_m vgg11_bn vovnet39a xception41
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
    96: "inception_v3 inception_v4 inception_resnet_v2",
    256: "botnet26t_256 halonet26t swinv2_tiny_window8_256",
}


# Largest fractions of the MACs that may stay, where that is more than 30 %. First where nothing but the classes is
# frozen, but many MACs belong to layers of which one width shrinks; then where channels are frozen for a reason.
MOST_MACS = """
    ghostnet_100:0.32 hardcorenas_a:0.32 lcnet_050:0.36 mixnet_s:0.32 mnasnet_small:0.35 mobilenetv3_small_050:0.40
    repghostnet_050:0.37 tinynet_e:0.36

    botnet26t_256:0.33 caformer_s18:0.66 cait_xxs24_224:0.73 coat_tiny:0.70 coatnet_pico_rw_224:0.53
    convformer_s18:0.55 convit_tiny:0.74 convnext_atto:0.58 convnextv2_atto:1.00 crossvit_tiny_240:0.48 csatv2:0.86
    davit_tiny:0.82 deit_tiny_patch16_224:0.46 dm_nfnet_f0:0.99 dpn48b:0.49 eca_nfnet_l0:0.99 ecaresnet26t:0.46
    edgenext_xx_small:0.63 efficientformer_l1:0.37 efficientformerv2_s0:0.39 efficientvim_m1:0.52 efficientvit_b0:0.48
    efficientvit_m0:0.79 eva02_tiny_patch14_224:0.45 focalnet_tiny_srf:0.52 gcvit_xxtiny:0.80 hiera_tiny_224:0.73
    lambda_resnet26t:0.34 levit_128s:0.42 lowformer_b0:0.55 mambaout_femto:0.58 mixer_s32_224:0.55 mobilevit_xxs:0.39
    mobilevitv2_050:0.44 mvitv2_tiny:0.73 nest_tiny:0.78 nextvit_small:0.47 nf_regnet_b0:0.95 nf_resnet26:1.00
    pit_ti_224:0.54 poolformer_s12:0.58 pvt_v2_b0:0.68 rdnet_tiny:0.57 shvit_s1:0.45 swin_tiny_patch4_window7_224:0.52
    swinv2_tiny_window8_256:0.52 tiny_vit_5m_224:0.89 tnt_s_patch16_224:0.55 twins_svt_small:0.80
    vit_tiny_patch16_224:0.46 xcit_nano_12_p16_224:0.68
"""


def timm_zoo() -> list[ZooModel]:
    """The networks; none where timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    most = dict(item.split(":") for item in MOST_MACS.split())
    return [
        ZooModel(
            f"timm/{name}",
            SECTION,
            partial(timm.create_model, name, pretrained=False),
            partial(_image, size),
            most_macs=float(most.get(name, 0.3)),
        )
        for name, size in sorted((name, size) for size, names in SIZES.items() for name in names.split())
    ]


def _image(size: int) -> torch.Tensor:
    return torch.rand(2, 3, size, size)

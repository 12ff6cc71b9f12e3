"""Pictures and volumes in, pictures and volumes out: restoration and segmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.registry import Example, bare_package, family, fill
from zoo.vision import BATCH, FVCORE, PICTURE, TIMM, TORCHVISION, picture

MAMBAIR = ("https://github.com/csguoh/MambaIR", "33d7b3460c4665229334cc8de38c7f4c766ed3be")
UMAMBA = ("https://github.com/bowang-lab/U-Mamba", "28459e33ca03769800dd35e23c6e62491d1925b5")
NNUNET = ("nnunetv2",)


def _basicsr(repositories: Path) -> None:
    """Its own __init__ imports training, and metrics by OpenCV."""
    folder = repositories / "MambaIR" / "basicsr"
    for name in ("basicsr", "basicsr.archs", "basicsr.utils"):
        bare_package(name, folder.parent / name.replace(".", "/"))
    fill("basicsr.utils", get_root_logger=None)


@family(
    "MambaIR",
    *MAMBAIR,
    "MambaIR light, twice the size, 2 blocks, d 48, 10 states, 32 x 32",
    PICTURE,
    folders=("MambaIR", "mamba"),
    packages=TIMM,
    absent=TORCHVISION,
)
def mambair(repositories: Path) -> Example:
    _basicsr(repositories)
    from basicsr.archs.mambair_arch import MambaIR

    model = MambaIR(
        img_size=32,
        embed_dim=48,
        d_state=10,
        depths=(1, 1),
        mlp_ratio=1.2,
        upscale=2,
        upsampler="pixelshuffledirect",
    )
    return model.eval(), (picture(32),)


@family(
    "MambaIRv2",
    *MAMBAIR,
    "MambaIRv2Light, twice the size, 2 blocks, d 48, 32 x 32",
    BATCH,
    folders=("MambaIR", "mamba"),
    packages=TIMM,
    absent=TORCHVISION,
    refused="it draws Gumbel noise in eval mode, and scans in the order of an unstable sort: two runs differ. With an "
    "argmax and a stable sort in their place it exports",
)
def mambair_v2(repositories: Path) -> Example:
    _basicsr(repositories)
    from basicsr.archs.mambairv2light_arch import MambaIRv2Light

    model = MambaIRv2Light(
        img_size=32,
        embed_dim=48,
        depths=(1, 1),
        num_heads=(4, 4),
        upscale=2,
        upsampler="pixelshuffledirect",
    )
    return model.eval(), (picture(32),)


def _nnunet() -> None:
    """nnU-Net reads plans and trains; the networks are plain PyTorch."""
    fill("nnunetv2.utilities.plans_handling.plans_handler")
    fill("nnunetv2.utilities.network_initialization")


def _unet(dimensions: int, stages: int) -> dict[str, Any]:
    side = [3] * dimensions
    return {
        "input_channels": 1,
        "n_stages": stages,
        "features_per_stage": [16 * 2**i for i in range(stages)],
        "conv_op": nn.Conv2d if dimensions == 2 else nn.Conv3d,
        "kernel_sizes": [side] * stages,
        "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        "n_conv_per_stage": [1] * stages,
        "num_classes": 2,
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d if dimensions == 2 else nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }


@family(
    "U-Mamba Bot 2D",
    *UMAMBA,
    "UMambaBot, 4 stages, 16 to 128 features, 128 x 128",
    PICTURE,
    folders=("U-Mamba/umamba/nnunetv2/nets", "mamba"),
    packages=("einops", "dynamic-network-architectures"),
    absent=NNUNET,
)
def umamba_bot(_: Path) -> Example:
    _nnunet()
    from UMambaBot_2d import UMambaBot

    return UMambaBot(**_unet(2, 4)).eval(), (torch.randn(2, 1, 128, 128),)


@family(
    "U-Mamba Enc 3D",
    *UMAMBA,
    "UMambaEnc, 4 stages, 16 to 128 features, 16 x 16 x 16",
    BATCH,
    folders=("U-Mamba/umamba/nnunetv2/nets", "mamba"),
    packages=("einops", "dynamic-network-architectures"),
    absent=NNUNET,
    note="made for one size: scans run over channels where the volume is small",
)
def umamba_enc(_: Path) -> Example:
    _nnunet()
    from UMambaEnc_3d import UMambaEnc

    size = (16, 16, 16)
    return UMambaEnc(input_size=size, **_unet(3, 4)).eval(), (torch.randn(2, 1, *size),)


@family(
    "SegMamba",
    "https://github.com/ge-xing/SegMamba",
    "cff35970e0c542ad940b5701267f1ac888298b06",
    "SegMamba, 4 stages of 1 block, 48 to 128 features, 32 x 32 x 32",
    BATCH,
    folders=("SegMamba", "SegMamba/mamba"),
    packages=("einops",),
    note="three scans a block: forward, backward, across slices",
)
def seg_mamba(_: Path) -> Example:
    from model_segmamba.segmamba import SegMamba

    model = SegMamba(in_chans=1, out_chans=3, depths=[1, 1, 1, 1], feat_size=[48, 64, 96, 128], hidden_size=160)
    return model.eval(), (torch.randn(2, 1, 32, 32, 32),)


@family(
    "Swin-UMamba",
    "https://github.com/JiarunLiu/Swin-UMamba",
    "2c1f72e1975cef6621f239117efdc954237c6952",
    "SwinUMambaD, 4 stages of 1 block, d 32, 128 x 128",
    PICTURE,
    folders=("Swin-UMamba/swin_umamba/nnunetv2/nets", "mamba"),
    packages=(*TIMM, "dynamic-network-architectures"),
    absent=(*NNUNET, *TORCHVISION),
    note="height and width in 32s",
)
def swin_umamba(_: Path) -> Example:
    _nnunet()
    from SwinUMambaD import SwinUMambaD

    encoder = {"in_chans": 1, "patch_size": 4, "depths": [1, 1, 1, 1], "dims": 32}
    decoder = {
        "num_classes": 2,
        "deep_supervision": False,
        "features_per_stage": [32, 64, 128, 256],
        "drop_path_rate": 0.2,
        "d_state": 16,
    }
    return SwinUMambaD(encoder, decoder).eval(), (torch.randn(2, 1, 128, 128),)


@family(
    "VM-UNet",
    "https://github.com/JCruan519/VM-UNet",
    "43c495bfd0cb2bd58fd0147687c60c9c624c4840",
    "VSSM, 4 stages of 1 block down and up, d 32, 128 x 128",
    PICTURE,
    folders=("VM-UNet/models/vmunet", "mamba"),
    packages=TIMM,
    absent=(*TORCHVISION, *FVCORE),
    note="height and width in 32s",
)
def vm_unet(repositories: Path) -> Example:
    bare_package("vmunet", repositories / "VM-UNet" / "models" / "vmunet")
    from vmunet.vmamba import VSSM

    model = VSSM(
        in_chans=3,
        num_classes=1,
        depths=[1, 1, 1, 1],
        depths_decoder=[1, 1, 1, 1],
        dims=[32, 64, 128, 256],
        dims_decoder=[256, 128, 64, 32],
    )
    return model.eval(), (picture(128),)

"""Classifiers and detectors of pictures and videos."""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path

import torch
from torch import nn

from zoo.registry import Example, bare_package, family

PICTURE = ({0: "batch", 2: "height", 3: "width"},)
BATCH = ({0: "batch"},)
TIMM = ("timm", "einops")
# timm reads pictures by torchvision, whose wheel of the index wants another torch; models need nothing of it.
TORCHVISION = ("torchvision",)
# It counts operations in functions that no model calls.
FVCORE = ("fvcore",)
VMAMBA = ("https://github.com/MzeroMiko/VMamba", "2ed52ead062a51a64521ed3871d52914bf532876")


def picture(side: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, side, side)


@family(
    "Vim",
    "https://github.com/hustvl/Vim",
    "dd0358ad1e42701f22afbefa0717cc8825cf9f45",
    "VisionMamba tiny, 3 layers, d 192, 224 x 224",
    BATCH,
    folders=("Vim/vim", "Vim/mamba-1p1p1"),
    packages=TIMM,
    absent=TORCHVISION,
    note="its position embedding fixes the picture's size",
)
def vim(_: Path) -> Example:
    from models_mamba import VisionMamba

    model = VisionMamba(
        depth=3,
        embed_dim=192,
        num_classes=10,
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        final_pool_type="mean",
        if_abs_pos_embed=True,
        bimamba_type="v2",
        if_cls_token=True,
        if_divide_out=True,
        use_middle_cls_token=True,
    )
    return model.eval(), (picture(224),)


def _vmamba(repositories: Path, **options: object) -> Example:
    bare_package("models", repositories / "VMamba" / "classification" / "models")
    from models.vmamba import VSSM

    return VSSM(depths=[1, 1, 2, 1], dims=48, num_classes=10, **options).eval(), (picture(128),)


@family(
    "VMamba v05",
    *VMAMBA,
    "VSSM v05_noz, 5 blocks, d 48, 1 state, 128 x 128",
    PICTURE,
    folders=("VMamba/classification",),
    packages=TIMM,
    absent=(*TORCHVISION, *FVCORE),
    note="height and width in 32s",
)
def vmamba_v05(repositories: Path) -> Example:
    return _vmamba(
        repositories,
        ssm_d_state=1,
        ssm_ratio=1.0,
        ssm_conv_bias=False,
        forward_type="v05_noz",
        mlp_ratio=4.0,
        downsample_version="v3",
        patchembed_version="v2",
        norm_layer="ln2d",
    )


@family(
    "VMamba v0",
    *VMAMBA,
    "VSSM v0, 5 blocks, d 48, 16 states, 128 x 128",
    PICTURE,
    folders=("VMamba/classification",),
    packages=TIMM,
    absent=(*TORCHVISION, *FVCORE),
    note="height and width in 32s",
)
def vmamba_v0(repositories: Path) -> Example:
    return _vmamba(
        repositories,
        ssm_d_state=16,
        ssm_ratio=2.0,
        forward_type="v0",
        mlp_ratio=0.0,
        downsample_version="v1",
        patchembed_version="v1",
        norm_layer="ln",
    )


@family(
    "MambaVision",
    "mambavision",
    None,
    "MambaVision, depths 1 1 4 2, d 32, 224 x 224",
    ({},),
    packages=("mambavision", *TIMM),
    absent=(*TORCHVISION, "tensorboardX", "cv2"),
    note="the package 1.2.0 of the index; its window_reverse takes int() of a size, which fixes batch and picture",
)
def mambavision(_: Path) -> Example:
    from mambavision.models.mamba_vision import MambaVision

    model = MambaVision(
        dim=32,
        in_dim=16,
        depths=[1, 1, 4, 2],
        window_size=[8, 8, 14, 7],
        mlp_ratio=4,
        num_heads=[1, 2, 4, 8],
        num_classes=10,
    )
    return model.eval(), (picture(224),)


@family(
    "LocalMamba",
    "https://github.com/hunto/LocalMamba",
    "75e5d1f007c303509c77d179df38f7fa19c0d05c",
    "local VSSM, 4 blocks, d 48, windows of 2 and 7, 112 x 112",
    BATCH,
    folders=("LocalMamba/classification",),
    packages=TIMM,
    absent=(*TORCHVISION, *FVCORE),
)
def local_mamba(repositories: Path) -> Example:
    lib = repositories / "LocalMamba" / "classification" / "lib"
    for name in ("lib", "lib.models", "lib.models.mamba"):
        bare_package(name, lib.parent / name.replace(".", "/"))
    from lib.models.local_vmamba import VSSM

    directions = [
        ["h", "h_flip", "w7", "w7_flip"],
        ["h_flip", "v_flip", "w2", "w2_flip"],
        ["h", "v", "v_flip", "w2"],
        ["h", "h_flip", "v", "v_flip"],
    ]
    model = VSSM(depths=[1, 1, 1, 1], dims=[48, 96, 192, 384], num_classes=10, directions=directions)
    return model.eval(), (picture(112),)


@family(
    "VideoMamba",
    "https://github.com/OpenGVLab/VideoMamba",
    "f3427e42cb8453a523aec3a6f86d57b5bc1de5c3",
    "VisionMamba, 2 layers, d 192, 4 frames of 112 x 112",
    BATCH,
    folders=("VideoMamba/videomamba/video_sm/models", "VideoMamba/mamba"),
    packages=TIMM,
    absent=TORCHVISION,
    note="its position embedding fixes frames and their size",
)
def video_mamba(repositories: Path) -> Example:
    bare_package("video_models", repositories / "VideoMamba/videomamba/video_sm/models")
    from video_models.videomamba import VisionMamba

    model = VisionMamba(img_size=112, depth=2, embed_dim=192, num_frames=4, num_classes=10)
    return model.eval(), (torch.randn(2, 3, 4, 112, 112),)


def definitions(path: Path, name: str) -> types.ModuleType:
    """A module of a file's imports, functions and classes alone: what else it says at its end wants CUDA."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kept = (ast.Import, ast.ImportFrom, ast.Try, ast.FunctionDef, ast.ClassDef)
    tree.body = [node for node in tree.body if isinstance(node, kept)]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    return module


@family(
    "MedMamba",
    "https://github.com/YubiaoYue/MedMamba",
    "104beb3d641d67cef6f09b94ac299083d91bc417",
    "VSSM, 5 blocks, d 48, 128 x 128",
    PICTURE,
    folders=("MedMamba", "mamba"),
    packages=TIMM,
    absent=TORCHVISION,
    note="its file ends with models on CUDA, which are left out; height and width in 32s",
)
def med_mamba(repositories: Path) -> Example:
    module = definitions(repositories / "MedMamba" / "MedMamba.py", "MedMamba")
    model = module.VSSM(depths=[1, 1, 2, 1], dims=[48, 96, 192, 384], num_classes=6)
    return model.eval(), (picture(128),)


@family(
    "Mamba-YOLO",
    "https://github.com/HZAI-ZJNU/Mamba-YOLO",
    "b26cbda230dfa217f96faee8dc7020db3962f3df",
    "SimpleStem, 3 VSSBlock, XSSBlock: the backbone of Mamba-YOLO-T, d 32, 160 x 160",
    PICTURE,
    folders=("Mamba-YOLO/ultralytics/nn/modules",),
    packages=TIMM,
    absent=TORCHVISION,
    note="the backbone: the detector's head has no scan; height and width in 32s",
)
def mamba_yolo(repositories: Path) -> Example:
    bare_package("yolo_modules", repositories / "Mamba-YOLO/ultralytics/nn/modules")
    from yolo_modules.mamba_yolo import SimpleStem, VisionClueMerge, VSSBlock, XSSBlock

    layers = [
        SimpleStem(3, 32),
        VSSBlock(32, 32),
        VisionClueMerge(32, 64),
        VSSBlock(64, 64),
        VisionClueMerge(64, 128),
        VSSBlock(128, 128),
        VisionClueMerge(128, 256),
        XSSBlock(256, 256),
    ]
    return nn.Sequential(*layers).eval(), (picture(160),)


@family(
    "PointMamba",
    "https://github.com/LMD0311/PointMamba",
    "80858e096e33ff7470640fe1f2132e5c1e667074",
    "PointMambaScan, 2 layers, d 128, 64 groups of 32 points",
    ({0: "batch"}, {0: "batch"}),
    folders=("PointMamba", "PointMamba/mamba"),
    packages=(*TIMM, "addict"),
    absent=(
        *TORCHVISION,
        "knn_cuda",
        "pointnet2_ops",
        "extensions",
        "termcolor",
        "easydict",
        "matplotlib",
        "mpl_toolkits",
    ),
    note="from groups of neighbours in order on: its farthest points are CUDA's alone, its order along curves takes "
    "numbers of the data into Python",
)
def point_mamba(_: Path) -> Example:
    from models import point_mamba_scan
    from models.point_mamba_scan import PointMambaScan

    point_mamba_scan.serialization_func = lambda points, tokens, where, _: (points, None, None, tokens, where)

    config = types.SimpleNamespace(
        trans_dim=128,
        depth=2,
        cls_dim=10,
        group_size=32,
        num_group=64,
        encoder_dims=128,
        drop_path=0.1,
        avg_head=True,
    )

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = PointMambaScan(config)
            self.model.group_divider = nn.Identity()

        def forward(self, neighbours: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model((neighbours, centers))
            return found

    return Grouped().eval(), (0.1 * torch.randn(2, 64, 32, 3), torch.rand(2, 64, 3))

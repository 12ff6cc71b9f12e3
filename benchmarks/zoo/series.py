"""Speech, depression and sentiment from several modalities, time series, network traffic."""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch import Tensor, nn

from zoo.registry import Example, family, fill
from zoo.vision import BATCH, TIMM, TORCHVISION


@family(
    "DepMamba",
    "https://github.com/Jiaxin-Ye/DepMamba",
    "6e96fd22a3949a68c4a98cb65d4d2982bf0add4c",
    "DepMamba of its own settings, 200 steps of 161 features",
    ({0: "batch", 1: "time"}, {0: "batch", 1: "time"}),
    folders=("DepMamba", "mamba"),
    packages=("einops",),
    absent=("speechbrain",),
    note="LayerNorm and Swish of speechbrain are PyTorch's LayerNorm and SiLU here",
)
def dep_mamba(_: Path) -> Example:
    fill("speechbrain.nnet.normalization", LayerNorm=nn.LayerNorm)
    fill("speechbrain.nnet.activations", Swish=nn.SiLU)
    from models import DepMamba

    model = DepMamba(
        audio_input_size=25,
        mm_input_size=256,
        mm_output_sizes=[256],
        num_layers=1,
        activation="GELU",
        mamba_config={"d_state": 12, "expand": 4, "d_conv": 4, "bidirectional": True},
        video_input_size=136,
    )
    mask = (torch.arange(200)[None] < torch.tensor([[200], [150]])).float()
    return model.eval(), (torch.randn(2, 200, 161), mask)


@family(
    "TF-Mamba",
    "https://github.com/codemous/TF-Mamba",
    "9a1f07f03110f4b5882a4a92cacb9f22ed0665ad",
    "TFMamba, d 64, a BERT of 2 layers, 50 words, 100 steps of audio and vision",
    ({0: "batch"}, {0: "batch"}, {0: "batch"}),
    folders=("TF-Mamba", "mamba"),
    packages=("einops", "transformers"),
    note="its BERT is small and random",
)
def tf_mamba(_: Path) -> Example:
    import transformers

    small = transformers.BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.BertModel.from_pretrained = classmethod(lambda cls, *_: cls(small))
    transformers.BertTokenizer.from_pretrained = classmethod(lambda *_: None)
    from models.TFMamba import TFMamba

    mixer = {
        "num_layers": 2,
        "d_model": 64,
        "activation": "GELU",
        "dropout": 0.2,
        "causal": False,
        "mamba_config": {"d_state": 12, "expand": 4, "d_conv": 4, "bidirectional": True},
        "attn_heads": 4,
    }
    settings = {
        "feature_extractor": {"bert_pretrained": ""},
        "tmm": {"input_length": [50, 100, 100], "input_dim": [64, 35, 74], "hidden_dim": 64},
        "tmr": {"input_dim_low": 64, "input_dim_high": 64, "dropout": 0.2},
        "tc_mamba": mixer,
        "tq_mamba": dict(mixer, mamba_config=dict(mixer["mamba_config"])),  # type: ignore[call-overload]
        "regression": {"input_dim": 64, "out_dim": 1},
    }

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = TFMamba({"model": settings})

        def forward(self, vision: Tensor, audio: Tensor, language: Tensor) -> Tensor:
            found: Tensor = self.model((None, None, None), (vision, audio, language))["sentiment_preds"]
            return found

    words = torch.stack([torch.randint(0, 100, (2, 50)), torch.ones(2, 50).long(), torch.zeros(2, 50).long()], dim=1)
    return Score().eval(), (torch.randn(2, 100, 35), torch.randn(2, 100, 74), words)


@family(
    "SEMamba",
    "https://github.com/RoyChao19477/SEMamba",
    "750ff5d8f0e112557ca039c268cdcc51e267f342",
    "SEMamba, 1 block, 16 features, 201 frequencies, 24 frames",
    ({0: "batch", 2: "time"}, {0: "batch", 2: "time"}),
    folders=("SEMamba", "SEMamba/mamba_install"),
    packages=("einops",),
    note="outputs are magnitude, phase and complex spectrum; the real part has a bias of 1, since the angle of what is "
    "near 0 is noise",
)
def se_mamba(_: Path) -> Example:
    from models.generator import SEMamba

    config = {
        "stft_cfg": {"n_fft": 400},
        "model_cfg": {
            "hid_feature": 16,
            "num_tfmamba": 1,
            "d_state": 16,
            "d_conv": 4,
            "expand": 4,
            "norm_epsilon": 1e-5,
            "beta": 2.0,
            "input_channel": 2,
            "output_channel": 1,
        },
    }
    model = SEMamba(config).eval()
    nn.init.ones_(model.phase_decoder.phase_conv_r.bias)
    return model, (torch.rand(2, 201, 24), torch.randn(2, 201, 24))


@family(
    "S-Mamba",
    "https://github.com/wzhwzhwzh0921/S-D-Mamba",
    "e7e8bf04066135afa43d85b0a87afa97cda16e3f",
    "S_Mamba, 2 layers both ways, d 128, 96 steps of 64 variates",
    ({0: "batch", 2: "variate"},),
    folders=("S-D-Mamba", "mamba"),
    packages=("einops",),
    absent=("reformer_pytorch",),
)
def s_mamba(_: Path) -> Example:
    from model.S_Mamba import Model

    settings = types.SimpleNamespace(
        seq_len=96,
        pred_len=48,
        d_model=128,
        d_state=16,
        d_ff=128,
        e_layers=2,
        dropout=0.1,
        activation="gelu",
        embed="timeF",
        freq="h",
        use_norm=True,
        output_attention=False,
        class_strategy="projection",
    )

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(settings)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.model(x, None, None, None)
            return found

    return Forecast().eval(), (torch.randn(2, 96, 64),)


def _time_machine(channels_alone: int) -> Example:
    from models.TimeMachine import Model

    settings = types.SimpleNamespace(
        enc_in=21,
        seq_len=96,
        pred_len=48,
        n1=128,
        n2=64,
        d_state=16,
        dconv=2,
        e_fact=1,
        dropout=0.1,
        revin=1,
        ch_ind=channels_alone,
        residual=1,
    )
    return Model(settings).eval(), (torch.randn(8, 96, 21),)


TIME_MACHINE = ("https://github.com/Atik-Ahamed/TimeMachine", "5bf17a728349c674eceafc28a90f22b904e38c2d")


@family(
    "TimeMachine mixed",
    *TIME_MACHINE,
    "TimeMachine, ch_ind 0, n1 128, n2 64, 96 steps of 21 variates",
    BATCH,
    folders=("TimeMachine/TimeMachine_supervised", "mamba"),
    packages=("einops",),
)
def time_machine_mixed(_: Path) -> Example:
    return _time_machine(0)


@family(
    "TimeMachine apart",
    *TIME_MACHINE,
    "TimeMachine, ch_ind 1, n1 128, n2 64, 96 steps of 21 variates",
    BATCH,
    folders=("TimeMachine/TimeMachine_supervised", "mamba"),
    packages=("einops",),
)
def time_machine_apart(_: Path) -> Example:
    return _time_machine(1)


@family(
    "MambaTS",
    "https://github.com/XiudingCai/MambaTS-pytorch",
    "3b6797d9bf5178a490e1bb3c3e9f4d223f2af51d",
    "MambaTS, 2 layers, d 128, 96 steps of 7 variates in patches of 16",
    BATCH,
    folders=("MambaTS-pytorch", "mamba"),
    packages=("einops",),
    absent=("python_tsp",),
    note="variables in their own order (VPT_mode 0)",
)
def mamba_ts(_: Path) -> Example:
    from models.MambaTS import Model

    settings = types.SimpleNamespace(
        task_name="long_term_forecast",
        seq_len=96,
        pred_len=48,
        patch_len=16,
        stride=16,
        d_model=128,
        e_layers=2,
        enc_in=7,
        dropout=0.1,
        VPT_mode=0,
        ATSP_solver="SA",
        use_casual_conv=True,
    )

    class Forecast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(settings)

        def forward(self, x: Tensor) -> Tensor:
            # It normalises in place.
            found: Tensor = self.model(x.clone(), None, None, None)
            return found

    return Forecast().eval(), (torch.randn(4, 96, 7),)


@family(
    "NetMamba",
    "https://github.com/wangtz19/NetMamba",
    "bef641e161553aaf8cf524e73b11b6ca3932e5ed",
    "NetMamba, 2 layers, d 192, 1600 bytes in strides of 4",
    BATCH,
    folders=("NetMamba/src", "NetMamba/mamba-1p1p1"),
    packages=TIMM,
    absent=TORCHVISION,
)
def net_mamba(_: Path) -> Example:
    from models_net_mamba import NetMamba

    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = NetMamba(num_classes=10, depth=2, embed_dim=192)

        def forward(self, flow: Tensor) -> Tensor:
            found: Tensor = self.model(flow)
            return found

    return Classes().eval(), (torch.randn(2, 1, 40, 40),)

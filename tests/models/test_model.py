"""The model's contracts: padding and batch invariance, absence told in two ways, gradients, sizes, weight names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_for, variant_named
from hcmen.mamba.scan import causal_conv1d_ref, selective_scan_ref
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.layers import AttentionPooling, BiMamba, BiMambaBlock, CNNBlock
from hcmen.models.hcmen.model import HCMEN
from hcmen.training.config import TrainConfig
from hcmen.training.presets import PRESETS, preset_named

CONFIG = ModelConfig(
    FeatureConfig(12, 11), FeatureConfig(5, 40), FeatureConfig(7, 23), width=20, tokens=6, states=5, expand=2
)


@pytest.fixture(scope="module")
def model() -> HCMEN:
    torch.manual_seed(0)
    model = HCMEN(CONFIG)
    # Parameters away from their initial values, where ones and zeros could hide a mistake.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def batch(size: int, seed: int = 0, config: ModelConfig = CONFIG) -> tuple[dict, dict]:
    """Ragged random clips, zero padded to the maximum; the first is one step long, the second as long as can be."""
    g = torch.Generator().manual_seed(seed)
    features, lengths = {}, {}
    for m in MODALITIES:
        steps = config.modality(m).max_steps
        length = torch.randint(1, steps + 1, (size,), generator=g)
        length[:2] = torch.tensor([1, steps])[:size]
        x = torch.randn(size, steps, config.modality(m).features, generator=g)
        features[m] = x * (torch.arange(steps) < length[:, None])[..., None]
        lengths[m] = length
    return features, lengths


def close(got, expected, atol=1e-5) -> None:
    for name in ("score", "modality_weights"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=atol, rtol=1e-5)


@pytest.mark.parametrize("filler", [0.0, 3.0, -1e3])
def test_padding_changes_nothing(model, filler):
    """More padding, and whatever stands in it, leaves the prediction as it was."""
    features, lengths = batch(5)
    longer = {}
    for m, x in features.items():
        padded = F.pad(x, (0, 0, 0, 17))
        longer[m] = torch.where(
            (torch.arange(padded.shape[1]) < lengths[m][:, None])[..., None], padded, torch.tensor(filler)
        )
    with torch.inference_mode():
        close(model(longer, lengths), model(features, lengths))


def test_a_clip_does_not_see_its_batch(model):
    features, lengths = batch(6)
    with torch.inference_mode():
        together = model(features, lengths)
        for i in range(6):
            alone = model(
                {m: x[i : i + 1, : lengths[m][i]] for m, x in features.items()},
                {m: x[i : i + 1] for m, x in lengths.items()},
            )
            close(alone, type(alone)(together.score[i : i + 1], together.modality_weights[i : i + 1]))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_told_of_an_absence_is_the_subset_model(model, variant):
    """Per-sample absence (training) and static absence (export) are the same function, also in mixed batches."""
    features, lengths = batch(4)
    others = torch.tensor([v.mask for v in VARIANTS[:3]])
    present = torch.cat([torch.tensor([variant.mask]), others])
    with torch.inference_mode():
        told = model(features, lengths, present)
        subset = model({m: features[m][:1] for m in variant.present}, {m: lengths[m][:1] for m in variant.present})
    close(type(told)(told.score[:1], told.modality_weights[:1]), subset)


def test_absent_features_are_never_read(model):
    """Whatever stands in the place of an absent modality, the score is the same."""
    features, lengths = batch(3)
    present = torch.tensor([v.mask for v in VARIANTS[1:4]])
    with torch.inference_mode():
        clean = model(features, lengths, present)
        changed = {m: torch.where(present[:, i, None, None], x, 50.0) for i, (m, x) in enumerate(features.items())}
        close(model(changed, lengths, present), clean)


def test_gradients_reach_every_parameter():
    torch.manual_seed(1)
    model = HCMEN(CONFIG).train()
    features, lengths = batch(7)
    present = torch.tensor([v.mask for v in VARIANTS])
    model(features, lengths, present).score.square().sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_weights_are_a_distribution(model):
    features, lengths = batch(4)
    with torch.inference_mode():
        weights = model(features, lengths).modality_weights
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert (weights > 0).all()


# Counts given in facts of the field for width 128: (states, expand) -> parameters of the mixer.
@pytest.mark.parametrize(("states", "expand", "count"), [(12, 4, 257_024), (16, 4, 269_312), (16, 2, 134_656)])
def test_parameter_count_of_a_bimamba_mixer(states, expand, count):
    assert sum(p.numel() for p in BiMamba(128, states, expand, 4).parameters()) == count


def test_parameter_count_of_a_cnn_block():
    assert sum(p.numel() for p in CNNBlock(128, 0.1).parameters()) == 49_408


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_round_trips(name):
    preset = preset_named(name)
    assert ModelConfig.from_json(preset.model.to_json()) == preset.model
    assert TrainConfig.from_json(preset.train.to_json()) == preset.train
    assert sum(p.numel() for p in HCMEN(preset.model).parameters()) > 10_000


def test_a_unidirectional_mamba_checkpoint_loads_by_name():
    """The state dict of mamba_ssm's Mamba(d_model=32, d_state=16, d_conv=4, expand=2), names and shapes."""
    shapes = {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (2 + 32, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }
    checkpoint = {k: torch.randn(s) for k, s in shapes.items()}
    mixer = BiMamba(32, 16, 2, 4)
    missing, unexpected = mixer.load_state_dict(checkpoint, strict=False)
    assert unexpected == []
    assert sorted(missing) == sorted(
        ["A_b_log", "D_b"]
        + [f"{n}_b.{k}" for n, ks in (("conv1d", "wb"), ("x_proj", "w"), ("dt_proj", "wb")) for k in _names(ks)]
    )
    torch.testing.assert_close(mixer.A_log.data, checkpoint["A_log"])


def _names(kinds: str) -> list[str]:
    return [{"w": "weight", "b": "bias"}[k] for k in kinds]


def test_bimamba_against_two_flipped_unidirectional_passes():
    """The block's definition: the reverse direction is the forward one, with its own weights, on flipped time."""
    torch.manual_seed(3)
    mixer = BiMamba(20, 5, 2, 4).double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 9, 20, dtype=torch.float64)

    def one_way(x, suffix, a_log, skip):
        u, z = mixer.in_proj(x).chunk(2, dim=-1)
        conv, x_proj, dt_proj = (getattr(mixer, n + suffix) for n in ("conv1d", "x_proj", "dt_proj"))
        u = F.silu(conv(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, B, C = x_proj(u).split([mixer.dt_rank, 5, 5], dim=-1)
        delta = F.softplus(dt_proj(dt))
        h, ys = torch.zeros(2, 40, 5, dtype=torch.float64), []
        for t in range(x.shape[1]):
            h = torch.exp(delta[:, t, :, None] * -torch.exp(a_log)) * h
            h = h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1) + skip * u[:, t])
        return torch.stack(ys, 1) * F.silu(z)

    forward = one_way(x, "", mixer.A_log, mixer.D)
    backward = one_way(x.flip(1), "_b", mixer.A_b_log, mixer.D_b).flip(1)
    expected = mixer.out_proj(0.5 * (forward + backward))
    torch.testing.assert_close(mixer(x), expected, atol=1e-12, rtol=1e-10)
    block = BiMambaBlock(20, 5, 2, 4).double()
    block.mixer = mixer
    torch.testing.assert_close(block(x), x + F.layer_norm(expected, (20,), eps=1e-6), atol=1e-12, rtol=1e-10)


def test_pooling_is_masked_attention():
    """Against a loop over samples that never sees the padding."""
    torch.manual_seed(4)
    pool = AttentionPooling(8, 3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    lengths = [7, 2]
    got = pool(x, torch.arange(7) < torch.tensor(lengths)[:, None])
    for i, n in enumerate(lengths):
        keys, values = pool.key(x[i, :n]), pool.value(x[i, :n])
        weights = ((pool.queries @ keys.T) / 8**0.5).softmax(-1)
        torch.testing.assert_close(got[i], weights @ values)


def test_normalisation_is_applied_to_raw_features(model):
    """A model that was told mean and std sees the same as one that gets standardised features."""
    features, lengths = batch(3)
    told = HCMEN(CONFIG).eval()
    told.load_state_dict(model.state_dict())
    generator = np.random.default_rng(0)
    statistics = {
        m: (generator.normal(size=x.shape[2]), generator.uniform(0.5, 2, size=x.shape[2])) for m, x in features.items()
    }
    statistics["audio"][1][0] = 0.0  # a feature that never varies is only centred
    told.set_normalisation(statistics)
    scaled = {
        m: (x - torch.tensor(statistics[m][0]).float())
        / torch.tensor(np.where(statistics[m][1] > 0, statistics[m][1], 1)).float()
        for m, x in features.items()
    }
    with torch.inference_mode():
        close(told(features, lengths), model(scaled, lengths))


@pytest.mark.parametrize(
    ("mean", "std"), [(np.zeros(4), np.ones(4)), (np.full(5, np.nan), np.ones(5)), (np.zeros(5), -np.ones(5))]
)
def test_bad_statistics_are_refused(mean, std):
    with pytest.raises(InputError, match=r"audio has shape .* expected 5 finite numbers"):
        HCMEN(CONFIG).set_normalisation({"audio": (mean, std)})


def test_native_and_reference_agree(model):
    from hcmen.mamba.scan import implementation

    features, lengths = batch(4)
    with torch.inference_mode():
        with implementation("native"):
            native = model(features, lengths)
        with implementation("ref"):
            reference = model(features, lengths)
    close(native, reference)


def test_bad_inputs_are_named(model):
    features, lengths = batch(2)
    with pytest.raises(InputError, match="no modality is present"):
        model({}, {})
    with pytest.raises(InputError, match=r"audio has shape \[2, 40, 4\], expected \[batch, time, 5\]"):
        model({"audio": features["audio"][..., :4]}, lengths)
    with pytest.raises(InputError, match="unknown modality 'smell'"):
        model({"smell": features["audio"]}, lengths)
    with pytest.raises(InputError, match="text has no length"):
        model({"text": features["text"]}, {})
    with pytest.raises(InputError, match="vision has batch 1"):
        model({"text": features["text"], "vision": features["vision"][:1]}, lengths)
    with pytest.raises(InputError, match=r"present is torch\.float32"):
        model(features, lengths, torch.ones(2, 3))


def test_variants_are_the_seven_subsets():
    assert len(VARIANTS) == 7 == len({v.present for v in VARIANTS})
    for v in VARIANTS:
        assert variant_for(reversed(v.present)) is variant_named(v.name) is v
        assert sorted((*v.present, *v.absent)) == sorted(MODALITIES)
    with pytest.raises(InputError, match="did you mean 'audio_missing'"):
        variant_named("audio_mising")
    with pytest.raises(InputError, match="no modality"):
        variant_for(())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"states": "12"}, "states' is '12', expected int"),
        ({"widht": 3}, "unknown config key 'widht', did you mean 'width'"),
        ({"text": {"features": 3}}, "text.max_steps' is missing"),
        ({"text": 5}, "text' is 5, expected FeatureConfig"),
        ({"label_min": 3.0}, r"label range is \[3.0, 3.0\]"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"width": True}, "width' is True"),
        ({"dropout": False}, "dropout' is False, expected float"),
        ({"dropout": 10**400}, "dropout' is a number of 1329 bits, expected float"),
        ({"proxies": 1}, "proxies' is 1, expected bool"),
        ({"cnn": "no"}, "cnn' is 'no', expected bool"),
        ({"mamba": None}, "mamba' is None, expected bool"),
    ],
)
def test_bad_configurations_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        ModelConfig.from_json({**CONFIG.to_json(), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mix": 1}, "mix' is 1, expected str"),
        ({"mix": None}, "mix' is None, expected str"),
        ({"mix": True}, "mix' is True, expected str"),
        ({"mix": "msmix"}, "mix is 'msmix', expected one of none, mixup, manifold, ms-mix, powmix"),
        ({"aux": "intensity"}, "aux is 'intensity', expected one of none, polarity"),
        ({"mix_same_sign": 0}, "mix_same_sign' is 0, expected bool"),
        ({"mix_same_sign": "true"}, "mix_same_sign' is 'true', expected bool"),
        ({"mix_alpha": 0}, "mix_alpha is 0, expected a positive number"),
        ({"mix_alpha": float("inf")}, "mix_alpha is inf"),
        ({"mix_alpha": True}, "mix_alpha' is True, expected float"),
        ({"powmix_ratio": float("nan")}, "powmix_ratio is nan"),
        ({"powmix_ratio": 10**400}, "powmix_ratio' is a number of 1329 bits, expected float"),
        ({"powmix_parts": 1}, "powmix_parts is 1, expected 2 to 65536"),
        ({"powmix_parts": 2.0}, "powmix_parts' is 2.0, expected int"),
        ({"powmix_probability": 1.5}, "powmix_probability is 1.5, expected 0 to 1"),
        ({"mix_similarity": -0.1}, "mix_similarity is -0.1, expected 0 to 1"),
        ({"mix_weight": -1.0}, "mix_weight is -1.0, expected 0 or more"),
        ({"polarity_weight": float("nan")}, "polarity_weight is nan, expected 0 or more"),
    ],
)
def test_bad_training_settings_are_refused_in_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        TrainConfig.from_json({**TrainConfig().to_json(), **change})
    assert "\n" not in str(caught.value)


def test_configurations_from_before_a_setting_have_its_default(model):
    """A checkpoint of an earlier version says nothing of the ablations, and has all that its model had."""
    old = {k: v for k, v in CONFIG.to_json().items() if k not in ("proxies", "cnn", "mamba")}
    assert ModelConfig.from_json(old) == CONFIG
    HCMEN(ModelConfig.from_json(old)).load_state_dict(model.state_dict())
    assert TrainConfig.from_json({"epochs": 3}) == TrainConfig(epochs=3)


# --- ablations --------------------------------------------------------------------------------------------------------

ABLATIONS = {
    "without proxies": {"proxies": False},
    "without CNN": {"cnn": False},
    "without Mamba": {"mamba": False},
    "without any": {"proxies": False, "cnn": False, "mamba": False},
}


@pytest.fixture(scope="module", params=ABLATIONS)
def ablated(request) -> HCMEN:
    torch.manual_seed(0)
    model = HCMEN(dataclasses.replace(CONFIG, **ABLATIONS[request.param]))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_an_ablation_leaves_its_weights_out(ablated):
    parts = {"proxies": ("proxies.", "mix_logits", "log_similarity"), "cnn": (".conv.",), "mamba": (".mixer.",)}
    names = list(ablated.state_dict())
    for switch, markers in parts.items():
        # Blocks inside the proxies go with them.
        found = [n for n in names if any(marker in n for marker in markers)]
        assert bool(found) == getattr(ablated.config, switch), switch


def test_an_ablated_model_keeps_the_invariances(ablated):
    """Padding, batch, and absence told in two ways."""
    test_padding_changes_nothing(ablated, 3.0)
    test_a_clip_does_not_see_its_batch(ablated)
    test_absent_features_are_never_read(ablated)
    for variant in VARIANTS:
        test_told_of_an_absence_is_the_subset_model(ablated, variant)


def test_gradients_reach_every_parameter_of_an_ablated_model(ablated):
    features, lengths = batch(7)
    present = torch.tensor([v.mask for v in VARIANTS])
    ablated.zero_grad()
    ablated(features, lengths, present).score.square().sum().backward()
    assert [n for n, p in ablated.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    ablated.zero_grad()


def test_without_proxies_an_absent_modality_is_its_learned_token():
    """The fused stream by hand: the gate's weights times H_m, or times the absent token at every place."""
    torch.manual_seed(2)
    model = HCMEN(dataclasses.replace(CONFIG, proxies=False)).eval()
    features, lengths = batch(3)
    seen = []
    model.backbone[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        tokens = model.encode({m: features[m] for m in ("text", "vision")}, lengths)
        weights = model.fuse(tokens).modality_weights
    absent = model.absent_tokens["audio"].expand(3, CONFIG.tokens, -1)
    streams = [tokens["text"], absent, tokens["vision"]]
    expected = sum(weights[:, i, None, None] * x for i, x in enumerate(streams))
    torch.testing.assert_close(seen[0], expected.detach())
    assert model.fuse(tokens).proxies == {}


def test_encode_and_fuse_are_the_forward_pass(model):
    features, lengths = batch(4)
    present = torch.tensor([v.mask for v in VARIANTS[:4]])
    with torch.inference_mode():
        outputs = model.fuse(model.encode(features, lengths), present)
        whole = model(features, lengths, present)
        assert torch.equal(model.head(outputs.pooled)[:, 0], whole.score)
    assert torch.equal(outputs.score, whole.score)
    assert torch.equal(outputs.modality_weights, whole.modality_weights)


def test_reference_functions_match_their_own_docstring():
    """reverse is flip, scan, flip: for both ops."""
    torch.manual_seed(5)
    x, w, b = torch.randn(2, 6, 3).double(), torch.randn(3, 4).double(), torch.randn(3).double()
    torch.testing.assert_close(causal_conv1d_ref(x, w, b, reverse=True), causal_conv1d_ref(x.flip(1), w, b).flip(1))
    delta, A, B, C = torch.rand(2, 6, 3).double(), -torch.rand(3, 4).double(), *torch.randn(2, 2, 6, 4).double()
    torch.testing.assert_close(
        selective_scan_ref(x, delta, A, B, C, reverse=True),
        selective_scan_ref(x.flip(1), delta.flip(1), A, B.flip(1), C.flip(1)).flip(1),
    )


def test_presets_carry_the_sizes_of_their_data_sets():
    every = {n: p for n, p in PRESETS.items() if p.model.inputs.modalities == MODALITIES}
    assert set(PRESETS) - set(every) == {"words"}
    sizes = {n: tuple(dataclasses.astuple(p.model.modality(m)) for m in MODALITIES) for n, p in every.items()}
    assert sizes["mosi"] == ((768, 50), (5, 375), (20, 500))
    assert sizes["mosei"] == ((768, 50), (74, 500), (35, 500))
    assert sizes["sims"] == ((768, 39), (33, 400), (709, 55))
    assert sizes["simsv2"] == ((768, 50), (25, 925), (177, 232))

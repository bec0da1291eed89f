"""Tests of evaluate.py: every measure against a literal loop over pixels; what is read, drawn and written.

    python -m pytest tests/test_evaluate.py        (from the root; a few seconds on a CPU)

Networks are stand-ins that give known logits, but where saved networks are read again.
"""

import argparse
import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
from data import Dataset, InputError, normalize, voc_palette
from eln import doubt, eln_input, rejected
from train_stage1 import make_networks, save, student_record

C, PALETTE = 3, [[10, 20, 30], [200, 0, 0], [0, 150, 90]]
ARGS = argparse.Namespace(
    backbone="resnet18", weights="none", eln_backbone="resnet18", eln_weights="none", width=8, alphas=[20.0],
    size=[32, 32], corrector="eln",
)


def labels(seed, H, W):
    return np.random.default_rng(seed).choice(np.uint8([*range(C), 255]), (H, W))


def logits_of(value, h, w):
    return torch.randn(C, h, w, generator=torch.Generator().manual_seed(value))


class Stub(nn.Module):
    """A segmentation network that recognises images of one grey value, and lists which it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, X, embed=False):
        assert not self.training
        value = round(float(X[0, 0, 0, 0]) * 0.229 * 255 + 0.485 * 255)  # ImageNet's mean and deviation
        self.seen.append(value)
        return logits_of(value, *X.shape[2:])[None], None


def bilinear(logits, H, W):
    """(C, h, w) -> (C, H, W), between pixel centres, edges repeated."""
    out = torch.zeros(len(logits), H, W)

    def places(n, N, i):
        x = max((i + 0.5) * n / N - 0.5, 0)
        return int(x), min(int(x) + 1, n - 1), x - int(x)

    for i in range(H):
        top, bottom, y = places(logits.shape[1], H, i)
        for j in range(W):
            left, right, x = places(logits.shape[2], W, j)
            upper = (1 - x) * logits[:, top, left] + x * logits[:, top, right]
            lower = (1 - x) * logits[:, bottom, left] + x * logits[:, bottom, right]
            out[:, i, j] = (1 - y) * upper + y * lower
    return out


def confusion(prediction, label):
    matrix = [[0] * C for _ in range(C)]
    for row, truth in zip(prediction, label):
        for p, y in zip(row, truth):
            if y != 255:
                matrix[y][p] += 1
    return torch.tensor(matrix)


def test_count_is_a_confusion_matrix_without_void():
    label, prediction = labels(0, 9, 11), labels(1, 9, 11) % C
    got = evaluate.count(torch.from_numpy(prediction).long(), torch.from_numpy(label).long(), C)
    assert got.tolist() == confusion(prediction.tolist(), label.tolist()).tolist()
    assert evaluate.count(torch.zeros(2, 2).long(), torch.full((2, 2), 255), C).sum() == 0


def test_iou_is_intersection_over_union_of_the_classes_that_occur():
    # class 0: 3 right of a union of 6; class 1: there but never found; class 2: absent; class 3: 4 of 7
    matrix = torch.tensor([[3, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 4]])
    wanted = [300 / 6, 0.0, math.nan, 400 / 7]
    assert evaluate.iou(matrix).tolist() == pytest.approx(wanted, nan_ok=True)
    assert evaluate.mean_iou(matrix) == pytest.approx((300 / 6 + 0 + 400 / 7) / 3)
    only_predicted = torch.tensor([[5, 5], [0, 0]])  # a class that is predicted but not there counts 0
    assert evaluate.iou(only_predicted).tolist() == [50, 0]


@pytest.mark.parametrize("crop", [False, True])
def test_score_counts_each_image_once_at_both_resolutions(tmp_path, monkeypatch, crop):
    size, files, shapes = (12, 10), {}, [(20, 15), (12, 10), (9, 14), (24, 20), (7, 7)]
    want = {"resized": torch.zeros(C, C).long(), "original": torch.zeros(C, C).long()}
    for i, (H, W) in enumerate(shapes):
        value, label = 40 * i + 17, labels(i, H, W)
        Image.fromarray(np.full((H, W), value, np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(label).save(tmp_path / f"{i}_mask.png")
        files[f"{i}"] = (tmp_path / f"{i}.png", tmp_path / f"{i}_mask.png")
        h, w = (H, W) if crop else size
        logits = logits_of(value, h, w)
        rows = [label[int((y + 0.5) * H / h)] for y in range(h)]
        nearest = [[row[int((x + 0.5) * W / w)] for x in range(w)] for row in rows]
        want["resized"] += confusion(logits.argmax(0).tolist(), nearest)
        want["original"] += confusion(bilinear(logits, H, W).argmax(0).tolist(), label.tolist())
    dataset = Dataset("folder", files, [], list(files), list("abc"), voc_palette(), crop)
    assert crop == torch.equal(want["resized"], want["original"])
    summed = []
    monkeypatch.setattr(evaluate.dist, "all_reduce", summed.append)  # the test adds the processes up itself
    for world in (1, 2, 3):
        network = Stub().train()
        parts = [evaluate.score(network, dataset, size, "cpu", rank, world) for rank in range(world)]
        for name in want:
            assert torch.equal(sum(part[name] for part in parts), want[name])
        assert sorted(network.seen) == [17, 57, 97, 137, 177]
        assert len(summed) == (world if world > 1 else 0)
        summed.clear()


def average_precision(scores, wrong):
    """From the definition: over distinct thresholds from high to low, precision times the gain in recall."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        claimed = [w for s, w in zip(scores, wrong) if s >= threshold]
        total += sum(claimed) / len(claimed) * (sum(claimed) / sum(wrong) - recall)
        recall = sum(claimed) / sum(wrong)
    return total


@pytest.mark.parametrize("levels", [400, 7], ids=["no ties", "ties"])
def test_average_precision_is_exact(levels):
    rng = np.random.default_rng(levels)
    scores = rng.permutation(400) % levels / levels * 20 - 10
    wrong = rng.random(400) < 0.2 + 0.02 * scores
    ranking = evaluate.Ranking(-30, 30, "cpu")
    for part in np.array_split(np.arange(400), 3):
        ranking.add(torch.from_numpy(scores[part]), torch.from_numpy(wrong[part]))
    want = average_precision(scores.tolist(), wrong.tolist())
    assert 0.25 < want < 0.9
    assert ranking.average_precision() == pytest.approx(want, abs=1e-9)


def test_scores_outside_the_steps_keep_their_end():
    ranking = evaluate.Ranking(-1, 1, "cpu", bins=4)
    ranking.add(torch.tensor([50.0, 0.3, -0.3, -50.0]), torch.tensor([True, False, True, False]))
    assert ranking.average_precision() == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def literal_rates(positive, claimed):
    hits = sum(p and c for p, c in zip(positive, claimed))
    precision = hits / sum(claimed) if any(claimed) else math.nan
    recall = hits / sum(positive) if any(positive) else math.nan
    both = sum(claimed) + sum(positive)
    return [precision, recall, 2 * hits / both if both else math.nan]


@pytest.mark.parametrize("with_eln", [True, False])
def test_error_localization_is_precision_recall_f1_of_both_classes(with_eln):
    """Images: 0 ordinary, with void; 1 few errors; 2 none; 3 all void; 4 ELN rejects nothing, and the less
    certain pixels are wrong."""
    H, W, threshold = 6, 7, 0.6
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(5, C, H, W, generator=generator)
    valid = torch.linspace(-20, 20, 5 * H * W)[torch.randperm(5 * H * W, generator=generator)]
    valid = valid.reshape(5, H, W)
    valid[4] = valid[4].abs() + 1
    truth = torch.stack([torch.from_numpy(labels(i, H, W)).long() for i in range(5)])
    prediction, (first, second) = logits.argmax(1), logits[4].topk(2, dim=0).values
    truth[1, 1:], truth[2], truth[3] = prediction[1, 1:], prediction[2], 255
    truth[4] = (prediction[4] + (first - second < 12)) % C
    scenes = [(torch.full((1, 3, H, W), float(i)), truth[i], truth[i]) for i in range(5)]

    def network(X):
        return logits[int(X[0, 0, 0, 0])][None], None

    def eln(x):
        i = int(x[0, 0, 0, 0])
        assert torch.equal(x, eln_input(scenes[i][0], logits[i][None]))
        return valid[i][None]

    table = evaluate.error_localization(network, eln if with_eln else None, scenes, threshold)
    assert list(table) == (["ELN"] if with_eln else []) + ["confidence", "entropy", "none"]
    images = {"ELN": [], "confidence": [], "none": []}  # per image (wrong, rejected) lists
    doubts = {"ELN": [], "confidence": [], "entropy": [], "none": []}
    errors = []
    for i in range(5):
        rows = {"ELN": ([], []), "confidence": ([], []), "none": ([], [])}
        for y in range(H):
            for x in range(W):
                if truth[i, y, x] == 255:
                    continue
                powers = [math.exp(v) for v in logits[i, :, y, x].tolist()]
                P = [power / sum(powers) for power in powers]
                wrong = P.index(max(P)) != truth[i, y, x]
                errors.append(bool(wrong))
                confident = max(P) > threshold
                refusals = ("ELN", valid[i, y, x] <= 0), ("confidence", not confident), ("none", False)
                for name, refused in refusals:
                    rows[name][0].append(bool(wrong))
                    rows[name][1].append(bool(refused))
                doubts["ELN"].append(-float(valid[i, y, x]))
                doubts["confidence"].append(-max(P))
                doubts["entropy"].append(-sum(p * math.log(p) for p in P))
                doubts["none"].append(0.0)
        for name in rows:
            images[name].append(rows[name])

    for name in table:
        # the softmax's scores are counted in steps, so that near neighbours may tie
        exact = average_precision(doubts[name], errors)
        assert table[name]["AP"] == pytest.approx(exact, abs=1e-6 if name == "ELN" else 3e-3)
        if name == "entropy":
            assert list(table[name]) == ["AP"]
            continue
        for positive in ("correct", "error"):
            error = positive == "error"
            turned = [[[flag == error for flag in flags] for flags in image] for image in images[name]]
            each = torch.tensor([literal_rates(*image) for image in turned]).double()
            pooled = literal_rates(*(sum((image[k] for image in turned), []) for k in (0, 1)))
            each = pytest.approx(each.nanmean(0).tolist(), abs=1e-6, nan_ok=True)
            assert table[name][positive]["image"] == each
            assert table[name][positive]["pooled"] == pytest.approx(pooled, nan_ok=True)


@pytest.mark.parametrize("C", [2, 5])
def test_the_s_ecn_rejects_and_doubts_by_its_own_class(C):
    generator = torch.Generator().manual_seed(0)
    logits, correction = (3 * torch.randn(2, C, 4, 5, generator=generator) for _ in range(2))
    refused, amount = rejected(correction, logits), doubt(correction, logits)
    for place in np.ndindex(2, 4, 5):
        one, other = (x[place[0], :, place[1], place[2]].tolist() for x in (logits, correction))
        c = one.index(max(one))
        odds = math.exp(other[c]) / sum(math.exp(value) for k, value in enumerate(other) if k != c)
        assert refused[place] == (other.index(max(other)) != c)
        assert float(amount[place]) == pytest.approx(-math.log(odds))


def result(folder, mIoU, stage="stage2", **arguments):
    entry = {"mIoU": mIoU, "best_mIoU": mIoU + 1, "steps": 400, "arguments": {"lr": 0.1, **arguments}}
    if stage == "stage2":
        entry |= {"mIoU_teacher": mIoU + 2, "best_mIoU_teacher": mIoU + 3}
    folder.mkdir(exist_ok=True)
    path = folder / "result.json"
    path.write_text(json.dumps({**evaluate.read_result(path), stage: entry}))
    return folder


def test_compare_makes_a_row_of_runs_that_differ_in_split_and_seed(tmp_path):
    runs = [
        result(tmp_path / "a", 30.0, split=0, seed=0, filter="eln", out="a"),
        result(tmp_path / "b", 36.0, split=1, seed=5, filter="eln", out="b"),
        result(tmp_path / "c", 20.5, split=0, seed=0, filter="none", out="c"),
        result(tmp_path / "d", 10.0, "stage1", split=0, seed=0),
    ]
    result(tmp_path / "a", 5.0, "stage1", split=0, seed=0)
    lines = evaluate.compare(runs).splitlines()
    sd = f"{math.sqrt(((30 - 33) ** 2 + (36 - 33) ** 2) / (2 - 1)):.2f}"
    assert lines[2:] == [
        f"| stage2, filter eln | 2 | 33.00 ± {sd} | 34.00 ± {sd} | 35.00 ± {sd} | 36.00 ± {sd} | 400 |",
        "| stage2, filter none | 1 | 20.50 | 21.50 | 22.50 | 23.50 | 400 |",
        "| stage1 | 1 | 10.00 | 11.00 |  |  | 400 |",
    ]
    assert len({line.count("|") for line in lines}) == 1
    assert evaluate.compare([runs[0], runs[3]], stage=1).splitlines()[2:] == [
        "| stage1 | 2 | 7.50 ± 3.54 | 8.50 ± 3.54 |  |  | 400 |"
    ]
    with pytest.raises(InputError, match="b has no stage1"):
        evaluate.compare(runs, stage=1)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"stage1": {}}', '{"stage1": 3}', "\0\0"])
def test_a_damaged_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(InputError, match="result.json is damaged"):
        evaluate.read_result(tmp_path / "result.json")


class Bomb:
    """Unpickling it the ordinary way creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


UNREADABLE = {
    "missing": None, "empty": b"", "zeros": b"\0" * 1000, "hello": b"hello", "a: 1": b"a: 1\n", "G": b"G",
    "zip": b"PK\x03\x04" + bytes(200), "list": [1, 2], "number": 5, "other dict": {"network": {}},
    "half a dict": {"args": {}, "step": 3},
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_an_unreadable_checkpoint_is_refused_by_name(tmp_path, case):
    path, content = tmp_path / "stage1.pt", UNREADABLE[case]
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError) as caught:
        evaluate.read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    path = tmp_path / "stage1.pt"
    torch.save({"x": torch.zeros(5000), "plain": [1, "a", {"b": 2.5}]}, path)
    read = evaluate.read_checkpoint(path, ("x",))
    assert torch.equal(read["x"], torch.zeros(5000)) and read["plain"] == [1, "a", {"b": 2.5}]
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match="stage1.pt"):
        evaluate.read_checkpoint(path, ("x",))


def test_code_in_a_checkpoint_never_runs(tmp_path):
    trace, path = tmp_path / "trace", tmp_path / "stage1.pt"
    pickle.loads(pickle.dumps(Bomb(trace))).close()
    assert trace.exists()  # the bomb is live
    trace.unlink()
    torch.save({"x": Bomb(trace)}, path)
    with pytest.raises(InputError, match="stage1.pt"):
        evaluate.read_checkpoint(path, ("x",))
    assert not trace.exists()


@pytest.fixture(scope="module")
def networks():
    """Networks whose BatchNorm statistics are not those of fresh ones."""
    torch.manual_seed(0)
    nets = make_networks(C, ARGS).train().to(memory_format=torch.channels_last)  # as the scripts do
    image = torch.randn(2, 3, 32, 32) + 1
    with torch.no_grad():
        logits, _, encoded = nets.main(image)
        nets.auxiliary(image, logits, *encoded)
    return nets.eval()


@pytest.fixture
def student(tmp_path, networks):
    dataset = Dataset("folder", {}, [], [], list("abc"), voc_palette())
    save(student_record(networks.main, dataset, ARGS), tmp_path / "student_stage1.pt")
    return tmp_path / "student_stage1.pt"


def test_a_saved_student_predicts_the_same(student, networks):
    network, record = evaluate.load_student(student)
    X = torch.randn(2, 3, 40, 33)
    with torch.no_grad():
        assert not network.training and torch.equal(network(X)[0], networks.main(X)[0])
    palette = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]
    want = {"classes": ["a", "b", "c"], "palette": palette, "size": [32, 32], "crop": False}
    assert {key: record[key] for key in want} == want


def test_a_student_of_another_width_is_refused(student):
    save({**torch.load(student), "width": 16}, student)
    with pytest.raises(InputError, match="student_stage1.pt holds other networks.*size mismatch"):
        evaluate.load_student(student)


def test_eln_is_read_from_a_checkpoint(networks):
    state = networks.state_dict()
    checkpoint = {"networks": state, "classes": list("abc"), "args": vars(ARGS)}
    eln = evaluate.load_eln("stage1.pt", checkpoint)
    x = torch.randn(1, 3 + C + 1, 32, 32)
    with torch.no_grad():
        assert not eln.training and torch.equal(eln(x), networks.auxiliary.eln(x))
    checkpoint["networks"] = {key: value for key, value in state.items() if "eln." not in key}
    assert evaluate.load_eln("stage1.pt", checkpoint) is None
    checkpoint["networks"] = {**state, "auxiliary.eln.more": torch.zeros(1)}
    with pytest.raises(InputError, match="stage1.pt holds other networks.*more"):
        evaluate.load_eln("stage1.pt", checkpoint)


def test_colour_paints_void_white():
    painted = evaluate.colour(torch.tensor([[0, 1], [2, 255]]), PALETTE)
    assert painted.dtype == np.uint8
    assert painted.tolist() == [[PALETTE[0], PALETTE[1]], [PALETTE[2], [255, 255, 255]]]


@pytest.mark.parametrize("with_eln", [True, False])
def test_fig5_shows_six_panels_and_rejected_pixels_white(with_eln):
    H, W, zoom = 36, 48, 4  # a panel is about 192 wide
    X = normalize(torch.full((1, 3, H, W), 90, dtype=torch.uint8))
    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    label, valid = torch.from_numpy(labels(3, H, W)).long(), torch.randn(H, W)
    eln = (lambda x: valid[None]) if with_eln else None
    sheet = np.asarray(evaluate.fig5(Stub().eval(), eln, X, image, label, PALETTE))
    panels = 6 if with_eln else 4
    assert sheet.shape == (H * zoom + 14, panels * W * zoom + (panels - 1) * 4, 3)
    corners = [(14 + zoom // 2, k * (W * zoom + 4) + zoom // 2) for k in range(panels)]
    shown = [sheet[top::zoom, left::zoom][:H, :W].tolist() for top, left in corners]
    prediction = logits_of(90, H, W).argmax(0)
    white, red, light, grey = [255] * 3, [220, 40, 40], [225] * 3, [128] * 3
    for i in range(H):
        for j in range(W):
            p, y, refused = int(prediction[i, j]), int(label[i, j]), bool(valid[i, j] <= 0)
            want = [image[:, i, j].tolist(), white if y == 255 else PALETTE[y], PALETTE[p]]
            want.append(grey if y == 255 else red if p != y else light)
            want.append(grey if y == 255 else red if refused else light)
            want.append(white if refused else PALETTE[p])
            assert [panel[i][j] for panel in shown] == want[:panels]


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("mode, suffix", [("RGB", "jpg"), ("L", "png"), ("RGBA", "png")])
def test_predict_writes_masks_of_the_images_own_size(tmp_path, crop, mode, suffix):
    H, W, path = 20, 30, tmp_path / f"my.photo.{suffix}"
    Image.new("L", (W, H), 90).convert(mode).save(path, **({"quality": 100} if suffix == "jpg" else {}))
    (tmp_path / "out").mkdir()
    record = {"size": [12, 10], "crop": crop, "palette": PALETTE}
    last = evaluate.predict(Stub().eval(), record, str(path), tmp_path / "out", "cpu")
    names = {part: tmp_path / "out" / f"my.photo_{part}.png" for part in ("class", "colour", "overlay")}
    assert last == str(names["overlay"]) and sorted((tmp_path / "out").iterdir()) == sorted(names.values())
    arrays = {part: np.asarray(Image.open(name)) for part, name in names.items()}
    logits = logits_of(90, H, W) if crop else bilinear(logits_of(90, 12, 10), H, W)
    want = logits.argmax(0).numpy()
    assert np.array_equal(arrays["class"], want)
    painted = np.array(PALETTE)[want]
    assert np.array_equal(arrays["colour"], painted)
    assert np.abs(arrays["overlay"] - (90 + painted) / 2).max() <= 1

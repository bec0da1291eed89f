"""Give the scripts damaged and odd input: each file is either used rightly, or refused in one line.

    python tests/mutate_inputs.py --count 500      (from the root; 6 minutes on two busy cores)

Each mutation of an image, mask, list, classes.txt, checkpoint or weights file is drawn from a seed and tried
in a process of its own, which reports exit code, messages, memory and opened files. See `judge`.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from PIL import Image

from conftest import NO_WEIGHTS, TINY, here, leaves, load, make_folder
from data import load_dataset

fork = multiprocessing.get_context("fork")
SECONDS, GIB = 120, 4  # what a process may take
LISTED = "--labeled-list datasets/labeled.txt".split()
STAGE1 = ["train_stage1.py", "--dataset", "folder", *NO_WEIGHTS, *TINY, *LISTED]
NEW = [*STAGE1, *"--out new --pretrain-iters 1 --eln-iters 0".split()]
OLD = [*STAGE1, *"--out run --pretrain-iters 1 --eln-iters 1".split()]
STAGE2 = "train_stage2.py run --device cpu --log-every 1 --iters 2".split()
EVALUATE = "evaluate.py run --device cpu".split()
EXIF_TURNS = {3: 2, 6: 1, 8: 3}  # orientation: turns of np.rot90 that make the stored from the upright array

TARGETS = "image image image mask mask list list classes checkpoint checkpoint weights name".split()
IMAGE_KINDS = (
    "16-bit", "RGBA", "LA", "CMYK", "1-bit", "grey", "palette with transparency", "EXIF", "1x1", "long",
    "bomb", "large", "fraction", "EPS",
)
MASK_KINDS = (
    "grey", "1-bit", "16-bit", "16-bit, large", "RGB", "RGBA", "LA", "value 3", "value 254", "other size",
    "EXIF", "TIFF, -1",
)
LIST_KINDS = (
    "CRLF", "BOM", "blank lines", "spaces", "duplicates", "pairs", "paths", "../", "absolute", "outside",
    "UTF-16", "no line end", "unknown", "quotes", "commas", "comment", "heading", "numbers",
)
# What must come of a list of ids of this kind, and of classes.txt; any line may be a class's name.
USED_LISTS = (
    "CRLF", "BOM", "blank lines", "spaces", "duplicates", "pairs", "paths", "../", "no line end",
)
REFUSED_CLASSES = ("UTF-16", "comment", "heading", "numbers")
NAME_KINDS = ("non-ASCII", "subfolder", "other folder than the mask's", "folder that is a link", "link")


# ---- Damage that fits any file ----


def flip_bits(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


DAMAGE = {  # name -> function of (content, rng)
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "bits flipped": flip_bits,
    "zero bytes": lambda content, rng: b"",
    "all zero": lambda content, rng: bytes(len(content)),
    "noise": lambda content, rng: rng.randbytes(len(content)),
    "tail doubled": lambda content, rng: content + content[len(content) // 2 :],
}


def damage(path, rng):
    kind = rng.choice(list(DAMAGE))
    content = path.read_bytes()
    path.unlink()  # checkpoints are links to files that must stay
    path.write_bytes(DAMAGE[kind](content, rng))
    return kind


# ---- Odd images and masks ----


def png(width, height, depth, colour_type, rows):
    """A PNG file's bytes; rows: zlib-compressed scan lines."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def zeros(width, height):
    """The scan lines of a black image of one bit a pixel, without ever holding them."""
    packer, line = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    return b"".join(packer.compress(line) for _ in range(height)) + packer.flush()


def odd_image(path, rng):
    """Replace an image by one of an odd kind -> its name, and the RGB array that it stands for or None.

    None: the image must be refused. The array's size is the old image's, unless the kind is about size.
    """
    with Image.open(path) as old:
        W, H = old.size
    noise = np.random.default_rng(rng.randrange(10**6))
    grey, rgb = noise.integers(0, 256, (H, W), np.uint8), noise.integers(0, 256, (H, W, 3), np.uint8)
    alpha = noise.integers(0, 256, (H, W, 1), np.uint8)
    kind = rng.choice(IMAGE_KINDS)
    options = {}
    if kind == "16-bit":
        low = noise.integers(0, 256, (H, W), np.uint16)
        image, stands_for = Image.fromarray(grey.astype(np.uint16) << 8 | low), np.stack([grey] * 3, 2)
    elif kind == "RGBA":
        image, stands_for = Image.fromarray(np.concatenate([rgb, alpha], 2)), rgb
    elif kind == "LA":
        image, stands_for = Image.fromarray(np.stack([grey, alpha[..., 0]], 2)), np.stack([grey] * 3, 2)
    elif kind == "CMYK":
        ink = Image.fromarray(np.concatenate([rgb, np.zeros_like(alpha)], 2), "CMYK")
        image, stands_for, options = ink, 255 - rgb, {"format": "TIFF"}
    elif kind == "1-bit":
        image, stands_for = Image.fromarray(grey > 127), np.stack([np.uint8(grey > 127) * 255] * 3, 2)
    elif kind == "grey":
        image, stands_for = Image.fromarray(grey), np.stack([grey] * 3, 2)
    elif kind == "palette with transparency":
        colours = noise.integers(0, 256, (256, 3), np.uint8)
        image, stands_for = Image.fromarray(grey, "P"), colours[grey]
        image.putpalette(colours.tobytes())
        options = {"transparency": bytes(range(256))}
    elif kind == "EXIF":
        orientation = rng.choice(list(EXIF_TURNS))
        image, stands_for = Image.fromarray(np.rot90(rgb, EXIF_TURNS[orientation]).copy()), rgb
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = orientation
    elif kind in ("1x1", "long"):
        shape = (1, 1, 3) if kind == "1x1" else rng.choice([(1, 20000, 3), (20000, 1, 3), (3, 60000, 3)])
        stands_for = noise.integers(0, 256, shape, np.uint8)
        image = Image.fromarray(stands_for)
    elif kind == "fraction":
        image, stands_for, options = Image.fromarray(grey.astype(np.float32)), None, {"format": "TIFF"}
    elif kind == "EPS":  # a program, which Pillow would hand to an interpreter
        image, stands_for, options = Image.fromarray(rgb), None, {"format": "EPS"}
    else:  # a few bytes that stand for many pixels
        side = 60000 if kind == "bomb" else 9000
        path.write_bytes(png(side, side, 1, 0, zeros(side, side)))
        return kind, None if kind == "bomb" else np.zeros((side, side, 3), np.uint8)
    image.save(path, **{"format": "PNG", **options})
    return kind, stands_for


def odd_mask(path, rng):
    """Replace a mask by one of an odd kind -> its name, and the classes that it stands for or None."""
    with Image.open(path) as old:
        label = np.asarray(old).copy()
    kind = rng.choice(MASK_KINDS)
    stands_for, options = label, {}
    if kind == "1-bit":
        stands_for = np.uint8(label == 1)
        image = Image.fromarray(stands_for.astype(bool))
    elif kind == "16-bit":
        image = Image.fromarray(label.astype(np.uint16))
    elif kind == "16-bit, large":
        image, stands_for = Image.fromarray(label.astype(np.uint16) * 257), None
    elif kind in ("RGB", "RGBA", "LA"):
        image, stands_for = Image.fromarray(label).convert(kind), None
    elif kind in ("value 3", "value 254"):
        label[3, 5] = int(kind.split()[1])
        image, stands_for = Image.fromarray(label), None
    elif kind == "other size":
        image, stands_for = Image.fromarray(label[1:]), None
    elif kind == "EXIF":
        orientation = rng.choice(list(EXIF_TURNS))
        image = Image.fromarray(np.rot90(label, EXIF_TURNS[orientation]).copy())
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = orientation
    elif kind == "TIFF, -1":
        image, stands_for, options = Image.fromarray(label.astype(np.int32) - 1), None, {"format": "TIFF"}
    else:
        image = Image.fromarray(label)
    image.save(path, **{"format": "PNG", **options})
    return kind, stands_for


# ---- Odd lists and names ----


def odd_list(path, rng):
    """Rewrite a list of ids or classes.txt in an odd way -> the way's name, and what must come of it.

    This is "use" or "refuse", or None if either is right.
    """
    lines = path.read_text().split()
    kind = rng.choice(LIST_KINDS)
    outside = path.parent.resolve().parent.parent / "outside" / "secret"
    text = {
        "CRLF": "\r\n".join(lines),
        "BOM": "\ufeff" + "\n".join(lines),
        "blank lines": "\n\n \n".join(lines) + "\n\n",
        "spaces": "".join(f"\t{line}  \n" for line in lines),
        "duplicates": "\n".join(lines + lines),
        "pairs": "".join(f"images/{line}.jpg masks/{line}.png\n" for line in lines),
        "paths": "".join(f"/anywhere/images/{line}.jpg\n" for line in lines),
        "../": "\n".join(["../images/t0", *lines]),
        "absolute": "\n".join([str(outside), *lines]),
        "outside": "\n".join(["../../outside/secret", *lines]),
        "UTF-16": "\n".join(lines),
        "no line end": "\n".join(lines),
        "unknown": "\n".join([*lines, "ghost"]),
        "quotes": "".join(f'"{line}"\n' for line in lines),
        "commas": "".join(f"{line},\n" for line in lines),
        "comment": "\n".join(["# a comment", *lines]),
        "heading": "\n".join(["name", *lines]),
        "numbers": "".join(f"{i}: {line}\n" for i, line in enumerate(lines)),
    }[kind]
    path.write_text(text, newline="", encoding="utf-16" if kind == "UTF-16" else "utf-8")
    if path.name == "classes.txt":
        return kind, "refuse" if kind in REFUSED_CLASSES else None
    if kind == "../" and path.name == "val.txt":
        return kind, "refuse"  # t0 is labelled
    return kind, "use" if kind in USED_LISTS else "refuse"


def odd_name(data, rng):
    """Give an image another name or place -> the way's name, and what must come of it.

    Its mask and the lists follow, but the mask stays in "other folder than the mask's".
    """
    key, kind = rng.choice(["t0", "t2", "v1"]), rng.choice(NAME_KINDS)
    if kind == "link":
        path = data / f"images/{key}.jpg"
        path.rename(data / "another.jpg")
        path.symlink_to(data / "another.jpg")
        return kind, "use"
    name = rng.choice(["größe", "猫_1", "фото.2"]) if kind == "non-ASCII" else f"day/{key}"
    folders = {"images": ".jpg", "masks": ".png"}
    for folder, ending in folders.items():
        if (folder, kind) == ("masks", "other folder than the mask's"):
            continue
        path = data / folder / f"{name}{ending}"
        path.parent.mkdir(exist_ok=True)
        (data / folder / f"{key}{ending}").rename(path)
        if kind == "folder that is a link":
            path.parent.rename(data / f"{folder} of the day")
            path.parent.symlink_to(data / f"{folder} of the day")
    for path in data.glob("*.txt"):
        lines = [name if line == key else line for line in path.read_text().split()]
        path.write_text("".join(f"{line}\n" for line in lines))
    return kind, "use" if kind in ("non-ASCII", "subfolder") else "refuse"


# ---- One mutation, and what comes of it ----


def mutate(work, rng):
    """Change one thing below `work` -> what it is (a dict for `judge`), and the command to try."""
    data, run = work / "datasets", work / "run"
    what = rng.choice(TARGETS)
    odd = rng.random() < 0.6
    if what not in ("checkpoint", "name"):
        (run / "stage2.pt").unlink()  # so that stage 2 has something to do
    if what == "image":
        key = rng.choice(["t0", "t1", "v0", "t4", "t6"])
        path = data / f"images/{key}.jpg"
        command = STAGE2 if key in ("t4", "t6") else NEW
        if key == "t6" and rng.random() < 0.3:
            command = [*EVALUATE, "--predict", "datasets/images/t6.jpg"]
        case = {"name": path.name, "key": key}
        if rng.random() < 0.1:
            other = data / "images" / rng.choice(["t2.jpg", "t7.jpg"])
            shutil.copy(other, path)
            case["kind"] = f"swapped with {other.name}"
        elif odd:
            case["kind"], image = odd_image(path, rng)
            mask = data / f"masks/{key}.png"
            if case["kind"] == "large" and command is NEW:
                mask.write_bytes(path.read_bytes())  # black is class 0
            if image is None:
                case["must"] = "refuse"
            elif mask.exists() and image.shape[:2] != np.asarray(Image.open(mask)).shape and command is NEW:
                case["must"] = "refuse"
            else:
                case.update(must="use", image=image)
        else:
            case["kind"] = damage(path, rng)
    elif what == "mask":
        key = rng.choice(["t0", "t1", "v0"])
        path, command = data / f"masks/{key}.png", NEW
        case = {"name": path.name, "key": key}
        if odd:
            case["kind"], label = odd_mask(path, rng)
            case.update(must="refuse") if label is None else case.update(must="use", label=label)
        elif rng.random() < 0.2:
            shutil.copy(data / "masks/t2.png", path)  # another size
            case.update(kind="swapped", must="refuse")
        else:
            case["kind"] = damage(path, rng)
    elif what in ("list", "classes"):
        names = ["classes.txt"] if what == "classes" else ["train.txt", "val.txt", "labeled.txt"]
        path = data / rng.choice(names)
        command, case = rng.choice([NEW, STAGE2]), {"name": path.name}
        if path.name == "labeled.txt":
            command = NEW  # stage 2 has the labelled ids from stage 1's checkpoint
        if odd:
            case["kind"], case["must"] = odd_list(path, rng)
        else:
            case["kind"] = damage(path, rng)
    elif what == "checkpoint":
        name, command = rng.choice([
            ("stage1.pt", OLD), ("stage1.pt", STAGE2), ("stage2.pt", STAGE2), ("stage2.pt", EVALUATE),
            ("student_stage2.pt", [*EVALUATE, "--predict", "datasets/images/t6.jpg"]),
        ])
        path, case = run / name, {"name": name, "intact": name}
        if odd and rng.random() < 0.5:
            other = rng.choice([n for n in ("stage1.pt", "stage2.pt", "student_stage1.pt") if n != name])
            path.unlink()
            os.link(run / other, path)
            case.update(kind=f"swapped with {other}", must="refuse", intact=None)
            if (name, other) == ("student_stage2.pt", "student_stage1.pt"):
                case["must"] = "use"  # both are students
        elif odd:
            state = load(path)
            dropped = rng.choice([key for key in state if key != "palette"])
            del state[dropped]
            path.unlink()
            torch.save(state, path)
            case.update(kind=f"without {dropped}", intact=None)  # used where it is not needed
        else:
            case["kind"] = damage(path, rng)
    elif what == "weights":
        path = work / "resnet.pth"
        command = [*NEW, rng.choice(["--weights", "--eln-weights"]), "resnet.pth"]
        command = [*command, "--eln-iters", "1"]
        case = {"name": path.name, "intact": path.name, "kind": damage(path, rng)}
    else:
        kind, must = odd_name(data, rng)
        case, command = {"kind": kind, "name": "", "must": must}, NEW
    return {"what": what, **case}, command


def attempt(work, seed, pipe):
    """In a process of its own: mutate, try, and report."""
    opened = []
    sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
    case, command = mutate(work, random.Random(seed))
    opened.clear()
    begin = time.monotonic()
    code, _, err = here(work, *command)
    case.update(command=" ".join(map(str, command)), code=code, err=err, seconds=time.monotonic() - begin)
    case["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    case["outside"] = [path for path in opened if "outside" in path]
    case["wrong"] = judge(work, case)
    case = {key: value for key, value in case.items() if not isinstance(value, np.ndarray)}
    pipe.send(json.dumps(case))


def judge(work, case):
    """What is wrong with the outcome of a mutation: a list of texts.

    Exit code 0 and silence, or 2 and one line that names the file; what stands for a known image or mask is
    read as such; a damaged checkpoint is used only if its tensors are whole; nothing outside is opened.
    """
    wrong, lines = [], case["err"].strip().splitlines()
    if case["code"] not in (0, 2):
        wrong.append(f"exit code {case['code']}")
    if case["code"] == 0 and lines:
        wrong.append("used, but with messages")
    if case["code"] == 2 and len([line for line in lines if not line.startswith((" ", "usage"))]) != 1:
        wrong.append("refused in other than one line")
    if "Traceback" in case["err"]:
        wrong.append("a traceback")
    if case["code"] == 2 and lines and Path(case["name"]).stem not in lines[-1]:
        wrong.append("the message does not name the file")
    if case.get("must") == "refuse" and case["code"] == 0:
        wrong.append("used, but must be refused")
    if case.get("must") == "use" and case["code"] == 2:
        wrong.append("refused, but must be used")
    if case["code"] == 0 and case.get("intact"):
        part = "." if case["what"] == "weights" else "run"
        paths = (folder / part / case["intact"] for folder in (work.parent / "base", work))
        before, after = (dict(leaves(load(path))) for path in paths)
        for key, value in before.items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, after[key]):
                wrong.append(f"used with another {key}")
    if case["code"] == 0 and ("image" in case or "label" in case):
        dataset = load_dataset("folder", work / "datasets")
        if "image" in case:
            read = dataset.read_image(case["key"]).permute(1, 2, 0).numpy().astype(int)
            if read.shape != case["image"].shape or abs(read - case["image"]).max() > 1:
                wrong.append("the image is read as another")
        elif not np.array_equal(dataset.read_label(case["key"]).numpy(), case["label"]):
            wrong.append("the mask is read as another")
    if case["gib"] > GIB:
        wrong.append(f"{case['gib']:.1f} GiB of memory")
    if case["outside"]:
        wrong.append(f"opened {case['outside'][0]}")
    return wrong


# ---- All mutations ----


def prepare(base):
    """A folder with data, a finished run and a weights file, and one outside with what may not be read."""
    make_folder(base / "datasets")
    for command in (OLD, STAGE2):
        assert here(base, *command)[0] == 0
    network = torchvision.models.get_model("resnet18", weights=None)
    torch.save(network.state_dict(), base / "resnet.pth")
    outside = base.parent / "outside"
    outside.mkdir()
    for name in ("secret.jpg", "t0.jpg", "secret.png"):
        Image.new("RGB", (56, 40)).save(outside / name)


def shallow_resnet(name, weights):
    return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])


def run(root, count, seed=0):
    """Try `count` mutations below the empty folder `root`. Returns their reports, a list of dicts."""
    reports = []
    with mock.patch.object(torchvision.models, "get_model", shallow_resnet):
        preparing = fork.Process(target=prepare, args=(root / "base",))  # this process stays without threads
        preparing.start()
        preparing.join()
        assert preparing.exitcode == 0
        for number in range(seed, seed + count):
            work = root / "work"
            shutil.copytree(root / "base", work, copy_function=copy)
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=attempt, args=(work, number, theirs))
            process.start()
            theirs.close()
            report = {"wrong": ["no end" if process.is_alive() else "a crash"]}
            if ours.poll(SECONDS):
                try:
                    report = json.loads(ours.recv())
                except EOFError:
                    report = {"wrong": ["a crash"]}
            process.kill()
            process.join()
            reports.append({"seed": number, **report})
            shutil.rmtree(work)
    return reports


def copy(source, target):
    """Checkpoints are linked: scripts only ever replace them."""
    (os.link if source.endswith(".pt") else shutil.copy2)(source, target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="the first mutation's; each has the next")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    reports = run(root, args.count, args.seed)
    shutil.rmtree(root)
    table = collections.Counter()
    for report in reports:
        table[report.get("what"), {0: "used", 2: "refused"}.get(report.get("code"), "neither")] += 1
        if report["wrong"]:
            print(json.dumps(report, indent=1))
    for (what, outcome), number in sorted(table.items(), key=str):
        print(f"{what!s:12}{outcome:10}{number:5}")
    gib, seconds = (max(report.get(key, 0) for report in reports) for key in ("gib", "seconds"))
    number = sum(bool(report["wrong"]) for report in reports)
    print(f"{len(reports)} mutations, {number} with something wrong; at most {gib:.2f} GiB, {seconds:.1f} s")
    sys.exit(any(report["wrong"] for report in reports))


if __name__ == "__main__":
    main()

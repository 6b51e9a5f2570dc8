"""Data for GFlowGR: download, verify, load, split, item text to vectors, and a toy world with known tastes.

    python data.py beauty            download and check Beauty, print its figures (or yelp, instruments, toy)
    python data.py path/to/Name      check a folder of your own: Name.inter.json and Name.item.json

The files are those that LETTER publishes (its pre-processing is the one GFlowGR's paper uses):

    NAME.inter.json   {"0": [0, 1, 2], ...}                            user -> item ids, oldest first
    NAME.item.json    {"0": {"title": "...", "description": "..."}}    item id -> text, ids 0 .. n_items - 1

Everything a training loop needs then lives in four flat tensors (`Examples`): a batch of histories is one
gather, without a DataLoader and without Python per sample. Below that is the plumbing of gflowgr.py: files of
vectors and codes, results on disk, and a command line made from a dataclass.

Shapes: U users, N items, E examples, B batch rows, T history length, L codes per item.
"""
from __future__ import annotations

import argparse
import collections
import dataclasses
import difflib
import hashlib
import http.client
import io
import itertools
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

BASE_URL = ("https://raw.githubusercontent.com/HonghuiBao2000/LETTER/"
            "8d0154e28de37dbb6e24871c508ad8ddb1921cda/data")
DATASETS = {  # --dataset -> folder name and the git blob id of each file: sha1 of b"blob <size>\0" + content
    "beauty": ("Beauty", {"inter": "9378c6e88224ebd22e57325d89edb8cfb73291ac",
                          "item": "098205baf4a483b818507dc98c4b9bc9151a69f0"}),
    "yelp": ("Yelp", {"inter": "c80dd3c4131613d694e6be909f0485fcec3b87e3",
                      "item": "5e19bf60af056342e80a564cd6a8859a4faa236e"}),
    "instruments": ("Instruments", {"inter": "89733901ab247616059e03c620bf3edff59bc549",
                                    "item": "e1b565483dc55f63dc260aab13d0b3e1d73420fd"}),
}


class DataError(Exception):
    """Something is wrong with the input; the message is a sentence: what, where, and what to do."""


class Data(NamedTuple):
    """A loaded dataset. Item ids are 0 .. N - 1; the id N is the padding of short histories."""
    name: str
    titles: list[str]              # (N,) for people
    texts: list[str]               # (N,) title and description, for item vectors
    items: torch.Tensor            # (n_interactions,) all sequences one after the other, oldest first
    offsets: torch.Tensor          # (U + 1,) user u's sequence is items[offsets[u]:offsets[u + 1]]
    liked: torch.Tensor | None     # (U, N) bool: what each user truly likes; only a toy world knows
    fingerprint: str               # hash of the content, part of every cache key

    @property
    def n_items(self) -> int:
        return len(self.texts)

    @property
    def n_users(self) -> int:
        return len(self.offsets) - 1


# ------------------------------------------------------------------------------------------------ download

def git_blob_id(content: bytes) -> str:
    """The id under which git stores `content`: 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, whatever goes wrong on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fetch(url: str, timeout: float = 30.0) -> bytes:
    """The body behind `url`, with a progress bar. Raises OSError or http.client.HTTPException; a body shorter
    than its announced length counts as http.client.IncompleteRead."""
    with urllib.request.urlopen(url, timeout=timeout) as response:
        size, chunks, received = int(response.headers.get("Content-Length") or 0), [], 0
        name = url.rsplit("/", 1)[-1]
        with tqdm(desc=name, total=size or None, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := response.read(1 << 16):
                chunks.append(chunk)
                received += len(chunk)
                bar.update(len(chunk))
    if received < size:
        raise http.client.IncompleteRead(b"", size - received)
    return b"".join(chunks)


def fetch_patiently(url: str, pauses: tuple[float, ...] = (1.0, 4.0)) -> bytes:
    """`fetch`, tried again after each pause when the server fails (5xx) or the connection breaks."""
    for pause in (*pauses, None):
        try:
            return fetch(url)
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if pause is None or refused:
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def download(dataset: str, data_dir: Path, base_url: str = BASE_URL,
             pauses: tuple[float, ...] = (1.0, 4.0)) -> Path:
    """Bring the files of a built-in dataset into data_dir/NAME and return that folder.

    Files that already lie there are used as they are. What is downloaded must match its git blob id; a file
    that is cut off or wrong never appears under the final name. Raises DataError.
    """
    name, blob_ids = DATASETS[dataset]
    for kind, blob_id in blob_ids.items():
        path = Path(data_dir) / name / f"{name}.{kind}.json"
        if path.exists():
            continue
        url = f"{base_url}/{name}/{path.name}"
        try:
            content = fetch_patiently(url, pauses)
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if type(error) is urllib.error.URLError else repr(error)
            raise DataError(f"could not fetch {url} ({reason}); put the file by hand at {path}, "
                            "or use --dataset toy, which needs no network") from error
        if git_blob_id(content) != blob_id:
            raise DataError(f"{url} is not the expected file (its git blob id is {git_blob_id(content)}, not "
                            f"{blob_id}); nothing was kept: try again, or put the file by hand at {path}")
        write_atomically(path, content)
    return Path(data_dir) / name


# ---------------------------------------------------------------------------------------------------- load

def load(dataset: str, data_dir: Path = Path("data"), seed: int = 42) -> Data:
    """Load `toy`, a built-in dataset (downloaded if missing) or the user's own folder. Raises DataError."""
    if dataset == "toy":
        return toy(seed)
    if dataset in DATASETS:
        return read_folder(download(dataset, data_dir))
    if Path(dataset).is_dir():
        return read_folder(Path(dataset))
    raise DataError(f"unknown dataset {dataset!r}: choose toy, {', '.join(DATASETS)}, "
                    "or the path of a folder Name with Name.inter.json and Name.item.json")


def read_folder(folder: Path) -> Data:
    """Read and check NAME/NAME.inter.json and NAME/NAME.item.json. Raises DataError naming file and entry."""
    name = Path(os.path.abspath(folder)).name       # a link keeps its own name
    item_path, inter_path = folder / f"{name}.item.json", folder / f"{name}.inter.json"
    titles, texts = read_items(item_path, read_json(item_path))
    sequences = read_sequences(inter_path, read_json(inter_path), len(texts))
    flat, offsets = flatten(sequences)
    return Data(name, titles, texts, flat, offsets, None,
                git_blob_id(item_path.read_bytes() + inter_path.read_bytes()))


def read_json(path: Path) -> dict:
    """A non-empty JSON object from a file, no key of it twice. Raises DataError."""
    def unique(pairs: list[tuple]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {json.dumps(twice)[:80]} stands twice")
        return content

    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; a dataset is a folder NAME with "
                        "NAME.inter.json and NAME.item.json, and --codes names a file")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON or bad UTF-8
        raise DataError(f"{path} is not valid JSON ({error}); replace it with a whole copy") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path} must hold a JSON object with at least one entry, as {{\"0\": ...}}")
    return content


def read_items(path: Path, content: dict) -> tuple[list[str], list[str]]:
    """Titles and texts by item id; ids must be "0" .. "N-1". Warns of items whose text is empty."""
    titles, texts = [], []
    for item in map(str, range(len(content))):
        entry = content.get(item)
        if entry is None:
            raise DataError(f'{path}: item "{item}" has no entry; the ids of {len(content)} items '
                            f'must be "0" to "{len(content) - 1}"')
        if not isinstance(entry, dict) or any(type(entry.get(key, "")) not in (str, type(None))
                                              for key in ("title", "description")):
            raise DataError(f'{path}: item "{item}" must be {{"title": text, "description": text}}, '
                            f"not {json.dumps(entry)[:80]}")
        titles.append((entry.get("title") or "").strip())
        texts.append(f"{titles[-1]} {entry.get('description') or ''}".strip())
    empty = [i for i, text in enumerate(texts) if not text]
    if empty:
        print(f'warning: {path}: {len(empty)} items have no text, the first is "{empty[0]}"; '
              "they are trained on with a zero vector", file=sys.stderr)
    return titles, texts


def read_sequences(path: Path, content: dict, n_items: int) -> list[list[int]]:
    """The users' sequences, each at least 3 items out of 0 .. n_items - 1. Raises DataError."""
    for user, sequence in content.items():
        if not isinstance(sequence, list):
            raise DataError(f'{path}: user "{user}" must have a list of item ids, not '
                            f"{json.dumps(sequence)[:80]}")
        if len(sequence) < 3:
            raise DataError(f'{path}: user "{user}" has {len(sequence)} interactions; at least 3 are needed '
                            "(one each for training, validation and test): remove the user")
        wrong = [i for i in sequence if type(i) is not int or not 0 <= i < n_items]
        if wrong:
            raise DataError(f'{path}: user "{user}" has the item {json.dumps(wrong[0])[:80]}, '
                            f"which is not in the catalogue (ids 0 to {n_items - 1})")
    return list(content.values())


def flatten(sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences one after the other (n_interactions,) and where each begins (U + 1,)."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    flat = np.fromiter(itertools.chain.from_iterable(sequences), np.int64, lengths.sum())
    return torch.from_numpy(flat), torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))


def toy(seed: int = 42, n_users: int = 2000, n_items: int = 600, n_categories: int = 15,
        n_brands: int = 20) -> Data:
    """A small world whose users' true preferences are known.

    A user has favourite categories and brands, and every item an appeal of its own. Sequences of 5 to 20
    items are drawn, without repetition, from the softmax of that preference, with a pull to the category of
    the item before. `liked`: each user's 5 % most preferred items, most of which the user never meets.
    """
    rng = np.random.default_rng(seed)
    category, brand = rng.integers(n_categories, size=n_items), rng.integers(n_brands, size=n_items)
    taste_category = 3.0 * (rng.random((n_users, n_categories)).argsort(1) < 2)
    taste_brand = 2.0 * (rng.random((n_users, n_brands)).argsort(1) < 3)
    preference = taste_category[:, category] + taste_brand[:, brand] + rng.normal(0, 0.7, n_items)  # (U, N)
    lengths = np.clip(rng.geometric(0.25, n_users) + 4, 5, 20)
    chosen, seen = [], np.zeros((n_users, n_items), bool)
    for _ in range(lengths.max()):
        pull = 1.5 * (category == category[chosen[-1]][:, None]) if chosen else 0.0
        noise = rng.gumbel(size=preference.shape)      # the argmax of logits + noise is a draw from softmax
        chosen.append(np.where(seen, -np.inf, preference + pull + noise).argmax(1))
        seen[np.arange(n_users), chosen[-1]] = True
    flat, offsets = flatten([list(row[:n]) for row, n in zip(np.stack(chosen, 1), lengths)])
    titles = [f"brand{b} product{i} of category{c}" for i, (b, c) in enumerate(zip(brand, category))]
    texts = [f"{title} kind{c} style{c} maker{b} tone{rng.integers(40)}"
             for title, c, b in zip(titles, category, brand)]
    liked = preference >= np.quantile(preference, 0.95, axis=1, keepdims=True)
    fingerprint = git_blob_id(flat.numpy().tobytes() + "\n".join(texts).encode())
    return Data("toy", titles, texts, flat, offsets, torch.from_numpy(liked), fingerprint)


# --------------------------------------------------------------------------------------------------- split

@dataclass
class Examples:
    """E pairs (history, target): the history of row e is items[start[e]:end[e]], its target items[end[e]]."""
    items: torch.Tensor    # (n_interactions,)
    start: torch.Tensor    # (E,)
    end: torch.Tensor      # (E,)
    user: torch.Tensor     # (E,)
    pad: int               # the id that fills short histories: N


    def to(self, device) -> Examples:
        return Examples(*(t.to(device) for t in (self.items, self.start, self.end, self.user)), self.pad)

    def __len__(self) -> int:
        return len(self.end)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Histories (B, T), oldest first, padded on the right to the longest of them, and targets (B,)."""
        start, end = self.start[rows], self.end[rows]
        position = start[:, None] + torch.arange(int((end - start).max()), device=end.device)
        items = self.items[position.clamp(max=len(self.items) - 1)]
        return torch.where(position < end[:, None], items, self.pad), self.items[end]


def split(data: Data, max_history: int = 20) -> dict[str, Examples]:
    """Leave-one-out: each user's last item is the test target, the one before it the validation target, each
    earlier one but the first a training target; the history is the last `max_history` items before it."""
    first, last = data.offsets[:-1], data.offsets[1:] - 1                              # (U,)
    user = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())    # (n_interactions,)
    position = torch.arange(len(data.items))
    train = position[(position > first[user]) & (position < last[user] - 1)]
    ends = {"train": train, "valid": last - 1, "test": last}
    start = {part: torch.maximum(first[user[end]], end - max_history) for part, end in ends.items()}
    return {part: Examples(data.items, start[part], end, user[end], data.n_items)
            for part, end in ends.items()}


def top(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k best items by scores (.., N), best first: ids (.., k), filled up with N where N < k."""
    n_items = scores.shape[-1]
    best = scores.topk(min(k, n_items)).indices
    return torch.nn.functional.pad(best, (0, k - best.shape[-1]), value=n_items)


def popularity(data: Data) -> torch.Tensor:
    """How often each item is a part of the training sequences: (N,) counts, validation and test left out."""
    held_out = torch.cat([data.offsets[1:] - 1, data.offsets[1:] - 2])
    return (torch.bincount(data.items, minlength=data.n_items)
            - torch.bincount(data.items[held_out], minlength=data.n_items))


def liked_unseen(recommended: torch.Tensor, data: Data) -> float:
    """How many items of a top 10 the user truly likes and never clicked, on average: only a toy world knows.
    recommended (U, W) item ids of all users, best first, N where there is none."""
    unseen = torch.ones(data.n_users, data.n_items + 1, dtype=torch.bool)
    unseen[torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff()), data.items] = False
    wanted = torch.nn.functional.pad(data.liked, (0, 1)) & unseen
    return wanted.gather(1, recommended[:, :10].cpu()).sum(1).double().mean().item()


# -------------------------------------------------------------------------------------------- item vectors

def text_vectors(texts: list[str], dim: int, seed: int = 42) -> torch.Tensor:
    """TF-IDF over words, then a truncated SVD (latent semantic analysis): (N, dim) float32, mean square 1.

    Words of fewer than two items say nothing about likeness and are left out. Items without words get zeros.
    """
    bags = [collections.Counter(re.findall(r"\w+", text.lower())) for text in texts]
    frequency = collections.Counter(itertools.chain.from_iterable(bags))
    words = {word: i for i, word in enumerate(sorted(w for w, n in frequency.items() if n > 1))}
    entries = [(i, words[w], (1 + np.log(n)) * np.log(len(texts) / frequency[w]))
               for i, bag in enumerate(bags) for w, n in bag.items() if w in words]
    if not entries:
        return torch.zeros(len(texts), dim)
    row, column, value = map(np.array, zip(*entries))
    norm = np.sqrt(np.bincount(row, value ** 2, minlength=len(texts)))
    matrix = torch.sparse_coo_tensor(np.stack([row, column]), value / np.maximum(norm[row], 1e-12),
                                     (len(texts), len(words)), dtype=torch.float32, check_invariants=True)
    rank = min(dim, *matrix.shape)      # the sketch is a little wider than that, which makes the cut sharp
    with torch.random.fork_rng(devices=[]):  # svd_lowrank draws its probes from the global generator
        torch.manual_seed(seed)
        left, scale, _ = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    vectors = torch.zeros(len(texts), dim)
    vectors[:, :rank] = left[:, :rank] * scale[:rank]
    return vectors / vectors.square().mean().sqrt().clamp(min=1e-12)


def read_vectors(path: Path, n_items: int) -> torch.Tensor:
    """A user's own item vectors (N, d) from a .npy file, rows by item id. Raises DataError."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except Exception as error:  # numpy fails in many ways on a damaged file; to the user each means the same
        raise DataError(f"{path} cannot be read as a .npy file of numbers ({error})") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != n_items \
            or vectors.shape[1] == 0 or vectors.dtype.kind not in "fiu":
        found = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "an archive"
        raise DataError(f"{path} holds {found}; expected one row of numbers for each of the {n_items} items")
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]} is not finite ({len(wrong)} such rows); items need numbers")
    vectors = torch.from_numpy(vectors / np.maximum(np.abs(vectors).max(), 1e-300)).float()     # of any scale
    return vectors / vectors.square().mean().sqrt().clamp(min=1e-12)


def format_codes(codes: torch.Tensor) -> str:
    """Codes (N, L) as LETTER's NAME.index.json: {"0": ["<a_183>", "<b_70>", ...], ...}."""
    return json.dumps({str(item): [f"<{chr(97 + level)}_{code}>" for level, code in enumerate(path)]
                       for item, path in enumerate(codes.tolist())})


def read_codes(path: Path, n_items: int) -> torch.Tensor:
    """Codes (N, L) from a file in LETTER's format. Raises DataError: malformed, or for other items."""
    content = read_json(path)
    if content.keys() != set(map(str, range(n_items))):
        raise DataError(f'{path} has codes for {len(content)} items, but this dataset has the items "0" to '
                        f'"{n_items - 1}": give the code file that belongs to it')
    rows = []
    for item in map(str, range(n_items)):
        tokens = content[item] if isinstance(content[item], list) else [content[item]]
        found = [re.fullmatch(rf"<{chr(97 + level)}_([0-9]{{1,5}})>", str(token))
                 for level, token in enumerate(tokens)]
        if not all(found) or not found or len(found) != len(content["0"]):
            raise DataError(f'{path}: item "{item}" has the codes {json.dumps(content[item])[:80]}, but each '
                            'item needs codes as "<a_183>", "<b_7>", as many as the first')
        rows.append([int(match[1]) for match in found])
    return torch.tensor(rows)


# -------------------------------------------------------------------------------------------- kept results

class Stages:
    """The stages of a run, each done once and then kept in a folder RUNS/DATASET/STAGE-HASH.

    The hash is made of just those settings and inputs that the stage depends on, so a change of one setting
    does only those stages again that it can change. cfg: a dataclass, its fields' metadata name a "group";
    needs: stage -> groups. A folder holds config.json, metrics.jsonl and checkpoint.pt.
    """

    def __init__(self, cfg, needs: dict[str, tuple[str, ...]], data: Data):
        self.cfg, self.needs, self.results = cfg, needs, {}
        self.root, self.fingerprint = Path(cfg.runs_dir) / data.name, data.fingerprint

    def settings(self, stage: str) -> dict:
        """The settings that a stage depends on, by name."""
        return {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(self.cfg)
                if f.metadata["group"] in self.needs[stage]}

    def folder(self, stage: str) -> Path:
        """Where a stage is kept. Of the files that settings name, the content counts, not the path."""
        settings = {**self.settings(stage), "dataset": self.fingerprint}
        for name in ("item_vectors", "codes"):
            if settings.get(name):
                settings[name] = git_blob_id(Path(settings[name]).read_bytes())
        key = hashlib.sha1(json.dumps(settings).encode()).hexdigest()[:10]
        return self.root / f"{self.cfg.loss if stage == 'finetune' else stage}-{key}"

    def stage(self, stage: str, build: Callable[[Callable[[dict], None]], dict]) -> dict:
        """The result of build(log), seeded and timed, or what an earlier run kept of it. Raises DataError."""
        folder, known = self.folder(stage), (self.folder(stage) / "checkpoint.pt").exists()
        torch.manual_seed(self.cfg.seed)
        result = self.results[stage] = keep(folder, self.settings(stage), build)
        origin = "kept from before" if known else "now kept"
        print(f"{stage:<10}{result['seconds']:7.1f} s, {origin} in {folder}", flush=True)
        return result


def keep(folder: Path, settings: dict, build: Callable[[Callable[[dict], None]], dict]) -> dict:
    """What `build` returned when it first ran for this folder: tensors and plain values, in checkpoint.pt.

    The first time, build(log) runs; each log(entry) adds a line to metrics.jsonl, and config.json holds the
    settings. The checkpoint appears whole or not at all, so that a build that was cut off starts again.
    """
    path = folder / "checkpoint.pt"
    if path.exists():
        return read_checkpoint(path, folder.name)
    write_atomically(folder / "config.json", json.dumps(settings, indent=2).encode())
    started = time.perf_counter()
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as lines:
        def log(entry: dict) -> None:
            lines.write(json.dumps({"seconds": round(time.perf_counter() - started, 2), **entry}) + "\n")
            lines.flush()
        result = {**build(log), "of": folder.name}
        result["seconds"] = time.perf_counter() - started
        log({name: value for name, value in result.items() if name in ("valid", "test", "figures")})
    buffer = io.BytesIO()
    torch.save(result, buffer)
    write_atomically(path, buffer.getvalue())
    return result


def read_checkpoint(path: Path, of: str) -> dict:
    """A result that `keep` wrote for the folder `of`; nothing in it is evaluated as code. Raises DataError
    when it is damaged or another's."""
    try:
        with zipfile.ZipFile(path) as parts:    # torch.load itself never looks at the check sums
            sound = parts.testzip() is None
        result = torch.load(path, map_location="cpu", weights_only=True)
        if sound and result["of"] == of:
            return result
    except Exception:  # a damaged file fails in many ways; to the user each means the same
        pass
    raise DataError(f"{path} is damaged or not of this program; remove it and the stage will be done again")


def load_state(model: torch.nn.Module, state: dict, folder: Path) -> torch.nn.Module:
    """Put a kept state into a model, ready for use. Raises DataError when it is of another size."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise DataError(f"{folder} holds a model of another size than these settings; remove that folder "
                        "and the stage will be done again") from None
    return model.eval()


# -------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one sentence, the nearest flag in it, and exit code 2."""

    def error(self, message: str):
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        self.exit(2, f"error: {message}{f' (did you mean {close[0]}?)' if close else ''}; see --help\n")


def command_line(settings: type, presets: dict[str, dict], argv: list[str] | None, prog: str, about: str):
    """An instance of the dataclass `settings` from the command line: one flag for each field, whose metadata
    hold "help", "group", "choices" and "below"; presets are other defaults for a --dataset. Numbers must be 0
    or more, integers but the seed 1 or more."""
    fields = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(settings)}
    parser = Parser(prog=prog, usage=f"python {prog} [--SETTING VALUE ...]", description=about,
                    allow_abbrev=False)
    groups = {f.metadata["group"]: None for f in fields.values()}
    groups = {name: parser.add_argument_group(name) for name in groups}
    for flag, f in fields.items():
        others = "".join(f", {name}: {other[f.name]}" for name, other in presets.items() if f.name in other)
        text = f"{f.metadata['help']} (default: {f.default}{others})".replace("%", "%%")
        kind = {"type": type(f.default), "choices": f.metadata["choices"] or None,
                "metavar": "|".join(f.metadata["choices"]) or "VALUE"}
        groups[f.metadata["group"]].add_argument(flag, default=f.default, help=text, **(
            {"action": argparse.BooleanOptionalAction} if type(f.default) is bool else kind))
    parser.set_defaults(**presets.get(parser.parse_args(argv).dataset, {}))
    values = vars(parser.parse_args(argv))
    for flag, f in fields.items():
        value, low = values[f.name], 1 if type(f.default) is int and f.name != "seed" else 0
        if type(f.default) in (int, float) and not low <= value < f.metadata["below"]:
            parser.error(f"{flag} {value} must be at least {low} and below {f.metadata['below']:g}")
    return settings(**values)


def explain(error: Exception) -> str:
    """One sentence for what can go wrong outside of the program's control."""
    if isinstance(error, DataError):
        return f"error: {error}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror or error}{place}; finished stages are kept, half-written ones not"
    if isinstance(error, MemoryError) or re.search("allocate|out of memory", str(error)):
        reason = str(error).strip().splitlines()[-1][:150] if str(error) else "out of memory"
        return f"error: not enough memory ({reason}); lower the sizes, as --batch"
    raise error  # a bug of this program: the traceback helps to find it


def aligned(table: list[list[str]]) -> str:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    width = [max(map(len, column)) for column in zip(*table)]
    return "\n".join("  ".join([row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])])
                     for row in table)


def describe(data: Data) -> str:
    """The dataset's figures as a small table."""
    n = len(data.items)
    rows = [("users", f"{data.n_users:,}"), ("items", f"{data.n_items:,}"), ("interactions", f"{n:,}"),
            ("mean length", f"{n / data.n_users:.2f}"), ("density", f"{n / data.n_users / data.n_items:.4%}"),
            ("training pairs", f"{len(split(data)['train']):,}")]
    return "\n".join([data.name, *(f"  {label:<15}{value:>10}" for label, value in rows)])


def main(argv: list[str] | None = None) -> int:
    """`python data.py NAME`: bring and check a dataset, print its figures. Returns the exit code."""
    parser = Parser(prog="data.py", allow_abbrev=False, description=main.__doc__)
    parser.add_argument("dataset", help=f"toy, {', '.join(DATASETS)}, or the path of a folder of your own")
    parser.add_argument("--data-dir", type=Path, default="data", help="where NAME/ lies (default: data)")
    args = parser.parse_args(argv)
    try:
        print(describe(load(args.dataset, args.data_dir)))
        return 0
    except (DataError, OSError) as error:
        print(explain(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing half-written was left behind", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

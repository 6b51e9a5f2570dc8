"""Data for GFlowGR: download, verify, load, split, item text to vectors, and a toy world with known tastes.

    python data.py beauty            download and check Beauty, print its figures (or yelp, instruments, toy)
    python data.py path/to/Name      check a folder of your own: Name.inter.json and Name.item.json

The files are those that LETTER publishes (its pre-processing is the one GFlowGR's paper uses):

    NAME.inter.json   {"0": [0, 1, 2], ...}                            user -> item ids, oldest first
    NAME.item.json    {"0": {"title": "...", "description": "..."}}    item id -> text, ids 0 .. n_items - 1

Everything a training loop needs then lives in four flat tensors (`Examples`): a batch of histories is one
gather, without a DataLoader and without Python per sample. Below that is the plumbing of gflowgr.py: files of
vectors and codes, several processes, results on disk, and a command line made from a dataclass.

Shapes: U users, N items, E examples, B batch rows, T history length, L codes per item.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import gc
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

with contextlib.suppress(ImportError):      # Windows has none: there only one run may be at work in a folder
    import fcntl

BASE_URL = ("https://raw.githubusercontent.com/HonghuiBao2000/LETTER/"
            "8d0154e28de37dbb6e24871c508ad8ddb1921cda/data")
DATASETS = {  # --dataset -> folder name and the git blob id of each file: sha1 of b"blob <size>\0" + content
    "beauty": ("Beauty", {"inter": "9378c6e88224ebd22e57325d89edb8cfb73291ac",
                          "item": "098205baf4a483b818507dc98c4b9bc9151a69f0",
                          "index": "6711ba430c7a6889e60f908554f72aae8a038039"}),
    "yelp": ("Yelp", {"inter": "c80dd3c4131613d694e6be909f0485fcec3b87e3",
                      "item": "5e19bf60af056342e80a564cd6a8859a4faa236e",
                      "index": "6198e401fc8733f8cf26051a8a5133f3fee0b3ed"}),
    "instruments": ("Instruments", {"inter": "89733901ab247616059e03c620bf3edff59bc549",
                                    "item": "e1b565483dc55f63dc260aab13d0b3e1d73420fd"}),
}


PRESETS = {  # --dataset -> defaults of its own
    "toy": dict(levels=2, codebook_size=32, d_model=64, d_kv=16, d_ff=256, layers=2, batch=64, sft_epochs=6.0,
                finetune_epochs=2.0, evaluations=4, valid_users=1000)}


NO_MEMORY = "allocate|out of memory|ALLOC_FAILED"       # torch has no exception of its own for that on a CPU


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


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that it appears whole or not at all, whatever goes wrong on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")    # containers may share process ids
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from HTTPS to anything else."""

    def redirect_request(self, request, file, code, message, headers, new):
        if request.full_url.startswith("https:") and not new.startswith("https:"):
            raise urllib.error.HTTPError(new, code, "a redirect away from HTTPS", headers, file)
        return super().redirect_request(request, file, code, message, headers, new)


def fetch(url: str, timeout: float = 30.0, most: int = 1 << 28, patience: float = 1800.0) -> bytes:
    """The body behind `url`, with a progress bar, through the proxy that the environment names. Raises
    OSError; http.client.HTTPException, also for a body shorter than announced; ValueError where the headers
    make no sense. timeout: seconds of silence; patience: seconds in all; most: bytes."""
    opener = urllib.request.build_opener(SafeRedirects)
    with opener.open(url, timeout=timeout) as response:
        size, chunks, received = int(response.headers.get("Content-Length") or 0), [], 0
        name, deadline = url.rsplit("/", 1)[-1], time.monotonic() + patience
        with tqdm(desc=name, total=size or None, unit="B", unit_scale=True, disable=quiet()) as bar:
            while chunk := response.read1(1 << 16):
                chunks.append(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if max(received, size) > most:
                    raise OSError(errno.EFBIG, f"more than the {most:,} bytes that a file may have")
                if time.monotonic() > deadline:
                    raise OSError(errno.ETIME, f"not all there after {patience:.0f} s")
    if received < size:
        raise http.client.IncompleteRead(b"", size - received)
    return b"".join(chunks)


def fetch_patiently(url: str, pauses: tuple[float, ...]) -> bytes:
    """`fetch`, tried again after each pause when the server fails (5xx) or the connection breaks."""
    for pause in pauses:
        try:
            return fetch(url)
        except (OSError, http.client.HTTPException) as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if refused or getattr(error, "errno", None) in (errno.EFBIG, errno.ETIME):
                raise
        time.sleep(pause)
    return fetch(url)


def download(dataset: str, data_dir: Path, base_url: str = BASE_URL, pauses: tuple[float, ...] = (1.0, 4.0),
             kinds: tuple[str, ...] = ("inter", "item")) -> Path:
    """Bring files of a built-in dataset into data_dir/NAME and return that folder. kinds: inter, item, index.

    Files that already lie there are used as they are. What is downloaded must match its git blob id; a file
    that is cut off or wrong never appears under the final name. Raises DataError.
    """
    name, blob_ids = DATASETS[dataset]
    for kind in kinds:
        path, blob_id = Path(data_dir) / name / f"{name}.{kind}.json", blob_ids[kind]
        if path.exists():
            continue
        url = f"{base_url}/{name}/{path.name}"
        path.parent.mkdir(parents=True, exist_ok=True)      # where nothing can be written, nothing is fetched
        try:
            content = fetch_patiently(url, pauses)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error.reason if type(error) is urllib.error.URLError else repr(error)
            raise DataError(f"could not fetch {url} ({reason}); put the file by hand at {path}, "
                            "or use --dataset toy, which needs no network") from error
        if git_blob_id(content) != blob_id:
            raise DataError(f"{url} is not the expected file (its git blob id is {git_blob_id(content)}, not "
                            f"{blob_id}); nothing was kept: try again, or put the file by hand at {path}")
        write_atomically(path, content)
    return Path(data_dir) / name


def published_codes(dataset: str, data_dir: Path) -> Path:
    """The file of the codes that LETTER published of a built-in dataset, downloaded if missing. Raises
    DataError."""
    known = [name for name, (_, blob_ids) in DATASETS.items() if "index" in blob_ids]
    if dataset not in known:
        raise DataError(f"--codes letter is known here for {' and '.join(known)}, not for {dataset!r}; "
                        "give the path of a NAME.index.json, or leave --codes out")
    folder = download(dataset, data_dir, kinds=("index",))
    return folder / f"{folder.name}.index.json"


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
    return Data(name, titles, texts, flat, offsets, None, fingerprint(texts, flat, offsets))


def fingerprint(texts: list[str], *parts: torch.Tensor) -> str:
    """A hash of texts and tensors: 40 hex digits."""
    return git_blob_id(b"".join(part.contiguous().numpy().tobytes() for part in parts)
                       + json.dumps(texts).encode())


def shown(value) -> str:
    """A value of a JSON file as a message shows it: at most 80 characters of one line."""
    return json.dumps(value)[:80]


def read_json(path: Path) -> dict:
    """A non-empty JSON object from a file, no key of it twice. Raises DataError."""
    def unique(pairs: list[tuple]) -> dict:
        content = dict(pairs)
        if len(content) < len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"the key {shown(twice)} stands twice")
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
                            f"not {shown(entry)}")
        title = (entry.get("title") or "").strip()
        titles.append("".join(letter if letter.isprintable() else " " for letter in title))
        texts.append(f"{title} {entry.get('description') or ''}".strip())
    empty = [i for i, text in enumerate(texts) if not text]
    if empty and not processes()[0]:
        print(f'warning: {path}: {len(empty)} items have no text, the first is "{empty[0]}"; '
              "they are trained on with a zero vector", file=sys.stderr)
    return titles, texts


def read_sequences(path: Path, content: dict, n_items: int) -> list[list[int]]:
    """The users' sequences, each at least 3 items out of 0 .. n_items - 1. Raises DataError."""
    for user, sequence in content.items():
        if not isinstance(sequence, list):
            raise DataError(f'{path}: user {shown(user)} must have a list of item ids, not '
                            f"{shown(sequence)}")
        if len(sequence) < 3:
            raise DataError(f"{path}: user {shown(user)} has {len(sequence)} interactions; at least 3 are "
                            "needed (one each for training, validation and test): remove the user")
        wrong = [i for i in sequence if type(i) is not int or not 0 <= i < n_items]
        if wrong:
            raise DataError(f'{path}: user {shown(user)} has the item {shown(wrong[0])}, '
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
    return Data("toy", titles, texts, flat, offsets, torch.from_numpy(liked),
                fingerprint(texts, flat, offsets))


# --------------------------------------------------------------------------------------------------- split

@dataclass
class Examples:
    """E histories and what follows them: the history of row e is items[start[e]:end[e]], its target
    items[end[e]]; or, where `every` says so, the item after each item of the history is a target.

    The items lie on the device of the model. What names them stays on the CPU, which must know how long a
    batch's longest history is: asking a GPU for that at every step would make each step wait for it.
    """
    items: torch.Tensor    # (n_interactions + 1,) the last is the pad
    start: torch.Tensor    # (E,)
    end: torch.Tensor      # (E,)
    user: torch.Tensor     # (E,)
    every: bool = False

    def to(self, device) -> Examples:
        return dataclasses.replace(self, items=self.items.to(device))

    def __len__(self) -> int:
        return len(self.end)

    def targets(self) -> torch.Tensor:
        """How many targets each row has: (E,)."""
        return self.end - self.start if self.every else torch.ones_like(self.end)

    @property
    def n_targets(self) -> int:
        """How many targets there are."""
        return int(self.targets().sum())

    def windows(self, length: int) -> Examples:
        """The same targets, each once, in as few rows: every user's sequence cut, from its end on, into
        windows of `length` items. Needs all pairs of each user, in order, of histories as long."""
        count = torch.unique_consecutive(self.user, return_counts=True)[1]
        behind = torch.repeat_interleave(count.cumsum(0), count) - 1 - torch.arange(len(self))
        last = behind % length == 0
        return Examples(self.items, self.start[last], self.end[last], self.user[last], every=True)

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Histories (B, T), oldest first, padded on the right to the longest of them, and targets (B,); or,
        where every item has one, (B, T), padded alike."""
        start, end = self.start[rows][:, None], self.end[rows][:, None]
        position = start + torch.arange(int((end - start).max()))
        real = position < end
        following = torch.where(real, position + 1, len(self.items) - 1) if self.every else end
        position = torch.cat([torch.where(real, position, len(self.items) - 1), following], 1)
        items = self.items[position.to(self.items.device, non_blocking=True)]
        return items[:, :real.shape[1]], items[:, real.shape[1]:] if self.every else items[:, -1]


def split(data: Data, max_history: int = 20) -> dict[str, Examples]:
    """Leave-one-out: each user's last item is the test target, the one before it the validation target, each
    earlier one but the first a training target; the history is the last `max_history` items before it."""
    first, last = data.offsets[:-1], data.offsets[1:] - 1                              # (U,)
    user = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())    # (n_interactions,)
    position = torch.arange(len(data.items))
    train = position[(position > first[user]) & (position < last[user] - 1)]
    ends = {"train": train, "valid": last - 1, "test": last}
    start = {part: torch.maximum(first[user[end]], end - max_history) for part, end in ends.items()}
    items = torch.nn.functional.pad(data.items, (0, 1), value=data.n_items)
    return {part: Examples(items, start[part], end, user[end]) for part, end in ends.items()}


def length_batches(lengths: torch.Tensor, batch: int, steps: int, seed: int,
                   targets: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """Rows (B,) of `steps` batches, each of histories of almost equal length, so that little is padded, and
    of at most `batch` targets, or one row; a row has one or targets[row]: how many rows, the longest of them
    decides, so that batches of one length have one shape, whatever their rows. Which rows of a length go
    together, and in which order the batches come, changes every epoch."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.ones(len(lengths), dtype=torch.long) if targets is None else targets
    while steps > 0:
        order = torch.argsort(lengths + torch.rand(len(lengths), generator=generator), descending=True)
        size, starts = (batch // targets[order]).clamp(min=1).tolist(), [0]     # size: if it begins here
        while starts[-1] < len(order):
            starts.append(starts[-1] + size[starts[-1]])
        chunks = order.tensor_split(starts[1:-1])
        for i in torch.randperm(len(chunks), generator=generator)[:steps].tolist():
            yield chunks[i]
        steps -= len(chunks)


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
    number = collections.defaultdict(itertools.count().__next__)                # of each word, as they come
    found = [np.array([number[word] for word in re.findall(r"\w+", text.lower())], np.int32)
             for text in texts]
    row = np.repeat(np.arange(len(texts), dtype=np.int64), [len(words) for words in found])
    entry, count = np.unique(row * len(number) + np.concatenate(found), return_counts=True)
    row, word = np.divmod(entry, max(len(number), 1))
    frequency = np.bincount(word)                                               # in how many items
    row, word, count = (x[frequency[word] > 1] for x in (row, word, count))
    if not len(row):
        return torch.zeros(len(texts), dim)
    value = (1 + np.log(count)) * np.log(len(texts) / frequency[word])
    column = np.unique(word, return_inverse=True)[1]
    norm = np.sqrt(np.bincount(row, value ** 2, minlength=len(texts)))
    # svd_lowrank draws its probes from the global generator
    with torch.random.fork_rng(devices=[]), torch.sparse.check_sparse_tensor_invariants():
        torch.manual_seed(seed)
        matrix = torch.sparse_coo_tensor(np.stack([row, column]), value / np.maximum(norm[row], 1e-12),
                                         (len(texts), column.max() + 1), dtype=torch.float32)
        rank = min(dim, *matrix.shape)      # the sketch is a little wider, which makes the cut sharp
        left, scale, _ = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    vectors = torch.zeros(len(texts), dim)
    vectors[:, :rank] = left[:, :rank] * scale[:rank]
    return vectors / vectors.square().mean().sqrt().clamp(min=1e-12)


def principal_vectors(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The first principal components of rows (N, d) -> (N, dim), mean square 1, zeros where dim > d."""
    left, scale, _ = torch.linalg.svd((x - x.mean(0)).float(), full_matrices=False)
    x = torch.nn.functional.pad(left * scale, (0, max(0, dim - left.shape[1])))[:, :dim]
    return x / x.square().mean().sqrt().clamp(min=1e-12)


def balanced_clusters(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Clusters (m,) of points (m, d) around centres (n, d), none of more than ceil(m / n) points: the nearest
    pair of a point and a centre with room left goes first."""
    n = len(centres)
    room, cluster = [math.ceil(len(points) / n)] * n, [-1] * len(points)
    for pair in torch.cdist(points, centres).flatten().argsort(stable=True).tolist():
        point, centre = divmod(pair, n)
        if cluster[point] < 0 < room[centre]:
            cluster[point] = centre
            room[centre] -= 1
    return torch.tensor(cluster, device=points.device)


def read_vectors(path: Path, n_items: int) -> torch.Tensor:
    """A user's own item vectors (N, d) from a .npy file, rows by item id. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file; --item-vectors names a .npy file")
    try:
        vectors = np.load(path, allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # numpy fails in many ways on a damaged file; to the user each means the same
        why = "" if "pickle" in str(error) else f" ({error})"       # numpy would have it loaded unsafely
        raise DataError(f"{path} is not a .npy file of numbers, as numpy.save writes one{why}") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or len(vectors) != n_items \
            or vectors.shape[1] == 0 or vectors.dtype.kind not in "fiu":
        found = f"{vectors.dtype} {vectors.shape}" if isinstance(vectors, np.ndarray) else "an archive"
        raise DataError(f"{path} holds {found}; expected one row of numbers for each of the {n_items} items")
    wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
    if len(wrong):
        raise DataError(f"{path}: row {wrong[0]} is not finite ({len(wrong)} such rows); items need numbers")
    vectors = vectors.astype(np.float64)        # by numpy: the same bits, so the same key, with any threads
    vectors /= max(np.abs(vectors).max(), 1e-300)                                       # of any scale
    return torch.from_numpy(vectors / max(np.sqrt(np.square(vectors).mean()), 1e-12)).float()


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
        found = [re.fullmatch(rf"<{re.escape(chr(97 + level))}_([0-9]{{1,5}})>", str(token))
                 for level, token in enumerate(tokens)]
        if not all(found) or not found or len(found) != len(content["0"]):
            raise DataError(f'{path}: item "{item}" has the codes {shown(content[item])}, but each '
                            'item needs codes as "<a_183>", "<b_7>", as many as the first')
        rows.append([int(match[1]) for match in found])
    return torch.tensor(rows)


# ---------------------------------------------------------------------------- device, optimiser, processes

def compute_type(device: torch.device, wanted: str) -> torch.dtype:
    """The type of the matrix products: what is wanted, else bf16 where the GPU or, on Linux, an x86 processor
    has it, else fp16 on CUDA and float32 on a CPU. Raises DataError for fp16 on a CPU."""
    if wanted == "fp16" and device.type == "cpu":
        raise DataError("--precision fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    with contextlib.suppress(OSError):          # float32 is right everywhere
        if re.search(r"\b(amx_bf16|avx512_bf16)\b", Path("/proc/cpuinfo").read_text()):
            return torch.bfloat16
    return torch.float32


def keep_memory() -> None:
    """Have glibc keep freed memory: by default it hands large buffers back to the kernel and faults them in
    again, page by page, at every step. Does nothing where there is no glibc."""
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):
            libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3        # names of malloc.h
            libc.mallopt(trim_threshold, 2 ** 31 - 1)
            libc.mallopt(mmap_threshold, 2 ** 30) or libc.mallopt(mmap_threshold, 2 ** 25)  # the older's most


def check_compiler(device: torch.device) -> None:
    """Raises DataError where torch.compile has nothing to compile with: it looks for no other than these."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise DataError("--compile needs triton, which comes with torch's CUDA builds on Linux; install it "
                        "or leave --compile out")
    if device.type == "cuda" and sys.platform == "win32":       # builds of triton for Windows bring their own
        return
    own = {"darwin": ["clang++"], "win32": ["cl"]}.get(sys.platform, ["g++"])
    variable, names = ("CXX", own) if device.type == "cpu" else ("CC", ["gcc", "clang"])    # triton's
    names = [os.environ[variable]] if variable in os.environ else names
    if not any(map(shutil.which, names)):
        raise DataError(f"--compile needs a compiler, and {' or '.join(names)} is not on the PATH; install "
                        f"it, name another one in {variable}, or leave --compile out")


def processes() -> tuple[int, int]:
    """The rank of this process and how many there are, as torchrun tells each that it starts."""
    world = int(os.environ.get("WORLD_SIZE") or 1)
    return int(os.environ.get("RANK") or 0) if world > 1 else 0, world


class Nowhere(io.StringIO):
    """Where the output of --quiet goes, and that of all processes but the first."""


def quiet() -> bool | None:
    """Whether progress bars are off, as tqdm's `disable`: True, or None: off where stderr is piped."""
    return isinstance(sys.stdout, Nowhere) or None


def choose_device(wanted: str) -> torch.device:
    """The device that --device names; of several processes each takes its own GPU, and joins the others.
    Raises DataError."""
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]*))?", wanted):
        raise DataError(f"--device {wanted} is not auto, cpu, cuda or cuda:N")
    several = processes()[1] > 1
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda:") and several:
        raise DataError(f"--device {wanted} is one GPU for several processes; use --device cuda")
    if wanted == "cuda" and several:
        if "LOCAL_RANK" not in os.environ:
            raise DataError("LOCAL_RANK, which names each process's GPU, is not set; start them by torchrun, "
                            "or use --device cpu")
        wanted, n = f"cuda:{os.environ['LOCAL_RANK']}", int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if n > torch.cuda.device_count():           # all processes see that, so none waits for another
            raise DataError(f"{n} processes need as many GPUs, and torch sees {torch.cuda.device_count()}; "
                            "lower --nproc_per_node, or use --device cpu")
    if wanted.startswith("cuda") and int(wanted[5:] or 0) >= torch.cuda.device_count():
        raise DataError(f"--device {wanted}: torch sees no such device; use --device cpu")
    device = torch.device(wanted)
    if device.index is not None:            # a bare "cuda" is torch's current device already
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        join(device)
    return device


def join(device: torch.device) -> None:
    """Let this process of several join the others. Raises DataError."""
    if device.type == "cuda" and not dist.is_nccl_available():
        raise DataError("several processes on GPUs need a torch with NCCL; use --device cpu")
    # Functions in there have the group as a default. Imported after it began, by DistributedDataParallel,
    # they would keep it and its threads alive until Python ends, which now and then aborts.
    importlib.import_module("torch.distributed.nn")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=7))     # the first may wait for another run
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        wrong = f"the processes did not find each other ({reason}); start them by torchrun"
        if processes()[0] and os.environ.get("LOCAL_RANK") != "0":      # of a DataError these do not speak
            print(f"error: {wrong}", file=sys.stderr)
        raise DataError(wrong) from None


def of_the_first(value):
    """What the first process has for `value`, in all of them."""
    box = [value]
    if processes()[1] > 1:
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
    return box[0]


def of_any(number: int) -> int:
    """The greatest number that any process has, in all of them."""
    if processes()[1] == 1:
        return number
    box = torch.tensor(number)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


def average(value: torch.Tensor) -> float:
    """The mean of a scalar over all processes."""
    value, (_, world) = value.detach().clone(), processes()
    if world > 1:
        dist.all_reduce(value)
    return value.item() / world


def relative_adamw(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with rates relative to a weight's size at the start, about 1 in an embedding and 0.05 in a matrix
    (T5's own Adafactor follows it). Of sizes one digit counts: one fused kernel serves all of like size."""
    sizes = {}
    for weight in model.parameters():
        sizes.setdefault(f"{max(1e-3, weight.detach().square().mean() ** 0.5):.0e}", []).append(weight)
    groups = [{"params": weights, "lr": lr * float(size)} for size, weights in sizes.items()]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)


class Step(torch.nn.Module):
    """A model and its loss, as the one module whose forward DistributedDataParallel follows."""

    def __init__(self, model: torch.nn.Module, loss_of: Callable):
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, *batch) -> torch.Tensor:
        return self.loss_of(*batch)


def data_parallel(model: torch.nn.Module, loss_of: Callable, targets: torch.Tensor) -> Callable:
    """loss_of(rows, progress), the mean over targets, such that each process computes its share of the rows
    and the gradients are those of the whole batch, in all of them. targets: how many each row has."""
    rank, world = processes()
    if world == 1:
        return loss_of
    weights = list(model.parameters())      # DDP would look for unused ones at each step and wait for the GPU
    gradients = torch.autograd.grad(loss_of(torch.arange(1), 1.0), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients):
        weight.requires_grad_(gradient is not None)
    step = torch.nn.parallel.DistributedDataParallel(Step(model, loss_of))
    torch.manual_seed(torch.initial_seed() + rank)      # from here on each draws noise of its own

    def part(rows: torch.Tensor, progress: float) -> torch.Tensor:
        if len(rows) < world:               # too few to share out: all do all of them
            return step(rows, progress)
        mine = rows[rank::world]
        return step(mine, progress) * (world * targets[mine].sum() / targets[rows].sum()).item()

    return part


class Graphs:
    """loss_of(*tensors, progress) of a model on a GPU, its two passes recorded as CUDA graphs, one of each
    for each shape of the tensors, and replayed: one by one, hundreds of small kernels take longer to launch
    than to run. loss_of gets the progress as a tensor, decides nothing by it, asks the GPU for no number.

    What a call returns and its gradients lie in memory of the graphs, which the next call overwrites, and so
    do the tensors of the first call of a shape: give it new ones.
    """

    def __init__(self, model: torch.nn.Module, loss_of: Callable, dtype: torch.dtype):
        gc.collect()            # graphs of a training that has ended lie in cycles, and hold their memory
        self.model, self.loss_of, self.dtype = model, loss_of, dtype
        self.device, self.recorded = next(model.parameters()).device, {}
        self.pool = torch.cuda.graph_pool_handle()          # shared: a replay needs nothing of the one before

    def __call__(self, *arguments) -> torch.Tensor:
        *batch, progress = arguments
        inputs = (*(x.to(self.device, non_blocking=True) for x in batch),
                  torch.full((), progress, device=self.device))
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(inputs)
        return self.recorded[shapes](*inputs)

    def record(self, inputs: tuple[torch.Tensor, ...]) -> Callable:
        """The graphs of one shape. What loads or chooses kernels does so in one run before the recording."""
        losses, device = [], self.device.type

        def loss_of(*inputs) -> torch.Tensor:
            self.model.train()                              # the run before may have ended in eval mode
            with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False):
                losses.append(self.loss_of(*inputs))        # a cached weight would be that of the recording
            return losses[-1]

        with warnings.catch_warnings(), torch.autocast(device, enabled=False):  # only in forward, as in `fit`
            warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")   # of torch's first run
            replay = torch.cuda.make_graphed_callables(Step(self.model, loss_of), inputs, num_warmup_iters=1,
                                                       allow_unused_input=True, pool=self.pool)
        for loss in losses:     # else each replay would add up the gradients on the stream of the recording
            loss.detach_()
        return replay


def graphed(model: torch.nn.Module, loss_of: Callable, dtype=torch.float32) -> Callable:
    """loss_of itself, or its `Graphs`: on a GPU, where one process trains a model (DistributedDataParallel
    acts between kernels) of at most 2^24 weights: each graph holds gradients of its own."""
    weights = list(model.parameters())
    single = weights[0].device.type == "cuda" and processes()[1] == 1
    return Graphs(model, loss_of, dtype) if single and sum(map(torch.numel, weights)) <= 2 ** 24 else loss_of


# -------------------------------------------------------------------------------------------- kept results

class Run:
    """One command: its settings, device, data, and its stages, each done once and then kept in a folder
    RUNS/DATASET/STAGE-HASH, or LOSS-HASH of a fine-tuning.

    The hash is made of just those settings and inputs that the stage depends on, so a change of one setting
    does only those stages again that it can change. cfg: a dataclass, its fields' metadata name a "group";
    needs: cfg -> {stage: groups}; fit: the training loop; metrics: item ids (U, W) and targets (U,) ->
    figures; unclicked: how many items that a user has not clicked are drawn for each history. A folder holds
    config.json, metrics.jsonl and checkpoint.pt; before that is there, snapshot.pt, from which a training
    that was cut off goes on.
    """

    def __init__(self, cfg, needs: Callable, fit: Callable, metrics: Callable, unclicked: int = 0):
        keep_memory()
        self.device = choose_device(cfg.device)
        self.dtype = compute_type(self.device, cfg.precision)
        if cfg.compile:
            check_compiler(self.device)
        if cfg.plot and not importlib.util.find_spec("matplotlib"):
            raise DataError("--plot needs matplotlib, which is not installed: pip install matplotlib")
        rank = processes()[0]
        if rank:                                            # what is missing, the first process downloads
            of_the_first(None)
        self.data = data = load(cfg.dataset, Path(cfg.data_dir), cfg.seed)
        letter = cfg.codes == "letter"
        codes_file = published_codes(cfg.dataset, Path(cfg.data_dir)) if letter else Path(cfg.codes)
        if not rank:
            of_the_first(None)
        self.cfg = cfg = dataclasses.replace(   # two ways to say the same are one, also for the cache
            cfg, precision=str(self.dtype)[6:],
            finetune_seed=-1 if cfg.finetune_seed == cfg.seed else cfg.finetune_seed)
        if data.offsets.diff().max() < 4:
            raise DataError(f"{data.name}: no user has the 4 interactions that a training pair needs")
        self.check_settings(unclicked)
        self.inputs = {}                        # read once: what a stage is made of is what its key says
        if cfg.codes:                           # they make vectors needless
            self.inputs["codes"] = read_codes(codes_file, data.n_items)
        elif cfg.item_vectors:
            self.inputs["item_vectors"] = read_vectors(Path(cfg.item_vectors), data.n_items)
        self.contents = {"dataset": data.fingerprint,
                         **{name: fingerprint([], value) for name, value in self.inputs.items()}}
        self.parts = {part: pairs.to(self.device) for part, pairs in split(data, cfg.max_history).items()}
        if cfg.encoder == "causal":
            self.parts["train"] = self.parts["train"].windows(cfg.max_history)
        order = torch.randperm(data.n_users, generator=torch.Generator().manual_seed(cfg.seed))
        self.valid_rows = order[:cfg.valid_users].sort().values
        self.needs_of, self.needs, self.results, self.sums = needs, needs(cfg), {}, {}
        self.fit, self.metrics = fit, metrics
        if cfg.fresh and not rank:              # only now: a command that is refused removes nothing
            self.forget()
        print(self.title(), flush=True)
        self.name_unused()

    def name_unused(self) -> None:
        """A warning that names the settings that were changed and that no stage depends on."""
        used, presets = {"run", *itertools.chain(*self.needs.values())}, PRESETS.get(self.cfg.dataset, {})
        unused = {f.name: value for f in dataclasses.fields(self.cfg) if f.metadata["group"] not in used
                  and (value := getattr(self.cfg, f.name)) != presets.get(f.name, f.default)}
        if unused and not processes()[0]:
            print(f"warning: nothing in this run depends on {flags(unused)}", file=sys.stderr)

    def title(self) -> str:
        """The line that a run begins with."""
        cfg, data, world = self.cfg, self.data, processes()[1]
        own = f" ({cfg.finetune_seed} for the fine-tuning)" if cfg.finetune_seed >= 0 else ""
        pairs = self.parts["train"].n_targets
        return (f"{data.name}: {data.n_users:,} users, {data.n_items:,} items, {pairs:,} training pairs; "
                f"{f'{world} processes, ' if world > 1 else ''}{self.device}, "
                f"{cfg.precision}, seed {cfg.seed}{own}")

    def check_settings(self, k: int) -> None:
        """Raises DataError where settings do not fit each other, or a pool may hold fewer than k items that a
        user has not clicked."""
        if self.cfg.sasrec_dim % self.cfg.sasrec_heads:
            raise DataError(f"--sasrec-dim {self.cfg.sasrec_dim} is no multiple of --sasrec-heads "
                            f"{self.cfg.sasrec_heads}")
        longest = min(self.cfg.max_history, int(self.data.offsets.diff().max()) - 3)
        available = max(0, min(self.cfg.pool, self.data.n_items) - longest - 1)
        if k > available:
            raise DataError(f"each history needs {k} unclicked items, and only {available} items of a pool "
                            f"of {self.cfg.pool} are surely unclicked; change --k, --negatives, "
                            "--max-history or --pool, or use --sampler none")

    def item_vectors(self) -> torch.Tensor:
        """Item vectors (N, d): those of --item-vectors, else made from the text."""
        if self.cfg.item_vectors:
            return self.inputs["item_vectors"]
        return text_vectors(self.data.texts, self.cfg.vector_dim, self.cfg.seed)

    @torch.no_grad()
    def recommended(self, model: torch.nn.Module, recommend: Callable, part: str,
                    rows: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What a model recommends to the users of a part, `rows` of them or all: item ids (U, W), best first,
        by recommend(histories (B, T)); and the items (U,) that they took. Each process scores its share."""
        examples, found, (rank, world) = self.parts[part], [], processes()
        rows = torch.arange(len(examples)) if rows is None else rows
        chunk = 256 if self.device.type == "cpu" else 1024      # a GPU takes as long for 256
        order = torch.argsort((examples.end - examples.start)[rows], stable=True)   # alike lengths together
        shared = 1 < world <= len(order)
        mine = order[rank::world] if shared else order
        model.eval()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for users in tqdm(rows[mine].split(chunk), desc=f"scoring: {part}", disable=quiet(), leave=False):
                found.append(recommend(examples.batch(users)[0]))
        items = torch.zeros(len(rows), found[0].shape[1], dtype=torch.long, device=self.device)
        items[mine] = torch.cat(found)
        if shared:
            dist.all_reduce(items)
        return items, examples.items[examples.end[rows]]

    def train(self, title: str, model: torch.nn.Module, recommend: Callable, loss: Callable, pairs: Examples,
              batch: int, steps: int, optimiser: torch.optim.Optimizer, journal: Journal, graphs: bool = True,
              **options) -> dict:
        """Fit a recommender on pairs, choose its state on validation users, score all of these and, once, the
        test users. recommend: histories (B, T) -> item ids (B, W), best first; loss(histories (B, T),
        targets, progress) -> scalar; batch: targets of a step; graphs: may a GPU replay the loss (`graphed`)?
        The others: see `fit`."""
        def score(part: str, rows: torch.Tensor | None = None) -> tuple[torch.Tensor, dict]:
            items, target = self.recommended(model, recommend, part, rows)
            return items, self.metrics(items, target)

        targets, loss = pairs.targets(), graphed(model, loss, self.dtype) if graphs else loss
        batches = length_batches(pairs.end - pairs.start, batch, steps, torch.initial_seed(), targets)
        loss_of = data_parallel(model, lambda rows, progress: loss(*pairs.batch(rows), progress), targets)
        self.fit(model, title, loss_of, batches, steps, optimiser, journal, self.dtype, self.cfg.evaluations,
                 lambda: score("valid", self.valid_rows)[1], **options)
        items, test = score("test")
        if self.data.liked is not None:
            test["liked"] = liked_unseen(items, self.data)
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        return {"state": state, "valid": score("valid")[1], "test": test, "top": items.int().cpu()}

    def seed(self, stage: str) -> int:
        """What fixes the random choices of a stage."""
        alone = stage == "finetune" and self.cfg.finetune_seed >= 0
        return self.cfg.finetune_seed if alone else self.cfg.seed

    def settings(self, stage: str) -> dict:
        """The settings that a stage depends on, by name."""
        return {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(self.cfg)
                if f.metadata["group"] in self.needs[stage]}

    def made_from(self, stage: str) -> dict[str, str]:
        """The hashes of what a stage's settings name: the dataset, and files of codes or item vectors."""
        settings = self.settings(stage)
        return {name: of for name, of in self.contents.items() if name in settings}

    def folder(self, stage: str) -> Path:
        """Where a stage is kept. Of the files that settings name, the content counts, not the path."""
        settings = {**self.settings(stage), **self.made_from(stage), "format": 8}
        key = hashlib.sha1(json.dumps(settings).encode()).hexdigest()[:10]
        label = self.cfg.loss if stage == "finetune" else stage
        return Path(self.cfg.runs_dir) / self.data.name / f"{label}-{key}"

    def forget(self) -> None:
        """Remove what is kept of all stages, so that even a run that is cut off mixes nothing old into it."""
        for folder in map(self.folder, self.needs):
            for name in ("checkpoint.pt", "snapshot.pt", f"{self.data.name}.index.json"):
                (folder / name).unlink(missing_ok=True)

    def kept(self, stage: str, aside: bool = True) -> dict | None:
        """What the first process finds kept of a stage, in all processes; None: it is to be done. aside: as
        in `read_kept`."""
        path, leads = self.folder(stage) / "checkpoint.pt", processes()[0] == 0
        return of_the_first(read_kept(path, self.before(stage), aside) if leads else None)

    def more_sft(self) -> dict | None:
        """What is kept of SFT in the method's place, from the same state and for as long; None: nothing."""
        other = copy.copy(self)
        other.cfg = dataclasses.replace(self.cfg, loss="sft")
        other.needs = self.needs_of(other.cfg)
        return other.kept("finetune", aside=False) if self.cfg.loss != "sft" else None

    def before(self, stage: str) -> dict[str, str]:
        """What the stages whose settings are all among this one's gave to it, as sums. It differs where one
        of them was lost and has been done again, by other threads or on another device."""
        return {name: part for name, part in self.sums.items()
                if name not in (stage, "vectors")           # those count by the codes that they led to
                and set(self.needs[name]) <= set(self.needs[stage])}

    def stage(self, stage: str, build: Callable[[Journal], dict]) -> dict:
        """The result of build(journal), seeded and timed, or what an earlier run kept of it."""
        folder, origin = self.folder(stage), "kept from before"
        with alone(folder):                     # another run may be at it: then wait for what it keeps
            result = self.kept(stage)
            if result is None:
                torch.manual_seed(self.seed(stage))
                journal = Journal(folder, self.cfg.save_every, self.afterwards(stage), self.before(stage))
                config = {**self.settings(stage), "made_from": self.made_from(stage)}
                result, origin = of_the_first(keep(journal, config, build)), "now kept"
        self.results[stage], self.sums[stage] = result, checksum(result)
        print(f"{stage:<10}{result['seconds']:7.1f} s, {origin} in {folder}", flush=True)
        return result

    def afterwards(self, stage: str) -> float:
        """How much longer than a stage the training after it takes, of which that is known: a fine-tuning
        takes its share of SFT's time."""
        if stage != "sft" or (self.folder("finetune") / "checkpoint.pt").exists():
            return 0.0
        return self.cfg.finetune_epochs / self.cfg.sft_epochs + self.cfg.from_scratch

    def compiled(self, model: torch.nn.Module, *stacks: str) -> torch.nn.Module:
        """The model, the blocks of its stacks compiled where --compile says so."""
        if self.cfg.compile:
            torch._dynamo.config.cache_size_limit = 64      # of shapes and modes: all blocks share one code
            torch._dynamo.config.optimize_ddp = False       # which would cut them up; they are small
            for block in itertools.chain.from_iterable(getattr(model, stack) for stack in stacks):
                block.compile(dynamic=True)
        return model

    def trained(self, stage: str, model: torch.nn.Module, build: Callable) -> torch.nn.Module:
        """A model in the state that its stage ended with."""
        return load_state(model, self.stage(stage, build)["state"], self.folder(stage))

    def publish(self, codes: torch.Tensor) -> None:
        """Write codes (N, L) in LETTER's format beside their checkpoint."""
        index = self.folder("codes") / f"{self.data.name}.index.json"
        content = format_codes(codes).encode()
        if processes()[0] == 0 and not (index.exists() and index.read_bytes() == content):
            write_atomically(index, content)


def open_lock(path: Path) -> int | None:
    """A descriptor of a lock's file, for writing where it may be: NFS locks no other. None where there is
    none and the folder can only be read."""
    for access in (os.O_RDWR, os.O_RDONLY):                     # another user's can only be read
        try:
            return os.open(path, access | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Work in a folder while no other process does: one that comes later waits. However the first one ends,
    the kernel then takes the lock from it, so nobody waits for the dead; what it had half written goes."""
    if processes()[0] or "fcntl" not in globals():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = open_lock(folder / ".lock")
    if lock is None:                        # a folder that can only be read: nothing is made in it
        yield
        return
    try:
        for attempt in itertools.count():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for part in folder.glob("*.pt.*.part"):     # of a run that was killed while it wrote
                    part.unlink()
                break
            except BlockingIOError:
                if attempt == 2:            # who only looks at what is kept is soon gone
                    print(f"another run is at work in {folder}: waiting for its result", flush=True)
                time.sleep(0.2)
            except OSError:                 # a file system without locks, or a part of another user
                break
        yield
    finally:
        os.close(lock)


class Journal:
    """What a stage in the making writes into its folder: lines of metrics.jsonl, and snapshots of its whole
    state, from which the same command goes on. Of several processes the first one writes, all of them read;
    without a folder nothing is written.

    every: seconds between two snapshots; afterwards: how much longer the next training takes than this one;
    before: the sums of what the stage is made from.
    """

    def __init__(self, folder: Path | None = None, every: float = 180.0, afterwards: float = 0.0,
                 before: dict[str, str] | None = None):
        self.folder, self.every, self.afterwards, self.before, found = folder, every, afterwards, before, None
        self.writes, self.lines = folder is not None and processes()[0] == 0, None
        if self.writes:
            found = read_kept(self.snapshot, before)
        self.found = of_the_first(found)
        self.started = self.saved = time.perf_counter()
        if self.found:
            self.started -= self.found["seconds"]

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshot.pt"

    def __enter__(self) -> Journal:
        if self.writes:                 # what was noted after the snapshot will be noted again
            self.lines = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")
            self.lines.truncate(min(self.found["noted"], self.lines.tell()) if self.found else 0)
            self.lines.seek(0, io.SEEK_END)         # where `save` finds out how much is noted
        return self

    def __exit__(self, *exception) -> None:
        if self.lines:
            self.lines.close()

    @property
    def seconds(self) -> float:
        """Since the stage began, the time between two runs left out."""
        return time.perf_counter() - self.started

    def log(self, entry: dict) -> None:
        """Add a line to metrics.jsonl."""
        if self.lines:
            self.lines.write(json.dumps({"seconds": round(self.seconds, 2), **entry}) + "\n")
            self.lines.flush()

    def due(self) -> bool:
        """Whether the time for another snapshot has come."""
        return self.writes and time.perf_counter() - self.saved >= self.every

    def save(self, state: dict) -> None:
        """Put the state of the training into the snapshot."""
        if self.writes:
            write_checkpoint(self.snapshot, {**state, "seconds": self.seconds, "noted": self.lines.tell(),
                                             "before": self.before})
            self.saved = time.perf_counter()


def keep(journal: Journal, settings: dict, build: Callable[[Journal], dict]) -> dict:
    """What build(journal) returns, tensors and plain values: also kept in checkpoint.pt, and the settings in
    config.json. The checkpoint appears whole or not at all, and the snapshot goes when it is there."""
    if journal.writes:
        write_atomically(journal.folder / "config.json", json.dumps(settings, indent=2).encode())
    with journal:
        result = build(journal)
        result.update(seconds=journal.seconds, before=journal.before)
        journal.log({name: value for name, value in result.items() if name in ("valid", "test")})
    if journal.writes:
        write_checkpoint(journal.folder / "checkpoint.pt", result)
        journal.snapshot.unlink(missing_ok=True)
    return result


def write_checkpoint(path: Path, content: dict) -> None:
    """Write tensors and plain values, and the name of the folder that they belong to."""
    buffer = io.BytesIO()
    torch.save({**content, "of": f"{path.parent.name}/{path.name}"}, buffer)
    write_atomically(path, buffer.getbuffer())


def read_checkpoint(path: Path) -> dict:
    """What `write_checkpoint` wrote; nothing in it is evaluated as code. {} where the file is damaged."""
    content = path.read_bytes() if path.is_file() else b""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:     # torch.load never looks at the check sums
            sound = parts.testzip() is None
        result = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True) if sound else {}
        return result if isinstance(result, dict) else {}
    except Exception as error:  # a damaged file fails in many ways; to the user each means the same
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            raise
        return {}


def checksum(result: dict) -> str:
    """A sum of what a stage gives to those after it: its model's state, codes or vectors."""
    parts = [*result.get("state", {}).values(), *(result[x] for x in ("codes", "vectors") if x in result)]
    return hashlib.sha1(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


def read_kept(path: Path, before: dict[str, str] | None = None, aside: bool = True) -> dict | None:
    """What `write_checkpoint` wrote for this very file, made from what has the sums `before`. None where
    there is none, and where it is damaged or of another: if `aside`, it is then set aside, which is said."""
    if not path.exists():
        return None
    result, fault, end = read_checkpoint(path), "is damaged or not of this program", "damaged"
    if result.get("of") == f"{path.parent.name}/{path.name}":
        if before is None or result.get("before", before) == before:
            return result
        fault, end = "was made from other codes or models than those that are kept now", "outdated"
    if aside:
        os.replace(path, path.with_name(f"{path.name}.{end}"))
    then = f"it is now {path.name}.{end}, and what it held is done again" if aside else "it is left out"
    print(f"warning: {path} {fault}; {then}", file=sys.stderr)
    return None


def read_config(folder: Path) -> dict:
    """The settings that a stage's folder tells of. Raises DataError."""
    config = read_json(folder / "config.json")
    return {"encoder": "full", **config} if "d_model" in config else config     # of before there was another


def read_generator(folder: Path, settings: type, history: list[int], k: int) -> tuple:
    """A finished generator of a run's folder: its settings, what was kept of it, and the history as a list.
    Raises DataError, too where k items after a history are more than its catalogue can answer."""
    folder, history = Path(folder), history.tolist() if hasattr(history, "tolist") else history     # an array
    result = read_checkpoint(folder / "checkpoint.pt")
    if not {"codes", "state"} <= result.keys():
        raise DataError(f"{folder} holds no finished generator, or a damaged one; name a folder as "
                        "runs/Beauty/tb-0123456789")
    n_items, config = len(result["codes"]), read_config(folder)
    try:
        history, k = list(map(operator.index, history)), operator.index(k)
    except TypeError:
        history = []
    if not history or not set(history) <= set(range(n_items)) or not 1 <= k <= n_items:
        raise DataError(f"a history needs item ids of 0 to {n_items - 1}, and k must be 1 to {n_items}")
    names = {f.name for f in dataclasses.fields(settings)}
    return settings(**{name: value for name, value in config.items() if name in names}), result, history


def load_state(model: torch.nn.Module, state: dict, folder: Path) -> torch.nn.Module:
    """Put a kept state into a model, ready for use. Raises DataError when it is of another size."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):
        raise DataError(f"{folder} holds a model of another size than these settings; remove that folder "
                        "and the stage will be done again") from None
    return model.eval()


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, args[0] being the signal's number."""


@contextlib.contextmanager
def on_signals(answer: Callable) -> Iterator[None]:
    """Within it answer(number, frame) follows Ctrl-C and SIGTERM; Python allows that in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, answer) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def stop(number: int, frame) -> None:
    """The answer to a signal outside of a training: leave at once."""
    raise Stopped(number)


class Progress(contextlib.ExitStack):
    """A training as it is seen from outside: a bar on a terminal, plain lines elsewhere, entries of
    metrics.jsonl, and snapshots of the whole state, every few minutes, at the end, and at Ctrl-C or SIGTERM,
    which wait for the end of a step. parts: all that has a state, by name: model, optimiser, scaler, ..;
    checks: the steps after which the model is validated."""

    def __init__(self, title: str, steps: int, journal: Journal, parts: dict, checks: set[int]):
        super().__init__()
        self.title, self.steps, self.journal, self.checks = title, steps, journal, checks
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.first, self.signals, self.validated, self.check_seconds = 0, [], {}, []

    def __enter__(self) -> Progress:
        super().__enter__()
        self.enter_context(on_signals(self.note))
        return self

    def __exit__(self, *exception) -> bool | None:
        super().__exit__(*exception)
        if self.signals and not any(exception):     # it came when no step was left to wait for
            raise Stopped(self.signals[0])

    def note(self, number: int, frame) -> None:
        """The first signal waits for the end of a step, a second one breaks through."""
        if self.signals:
            raise Stopped(number)
        self.signals.append(number)
        if not quiet():
            with contextlib.suppress(RuntimeError):     # it came while something else was being printed
                print("\nstopping after this step (again: at once)", file=sys.stderr)

    def resume(self) -> tuple[int, dict | None, float]:
        """The step after which the training goes on, the best state so far and its score. From a snapshot all
        parts get the states that they had; torch's random numbers go on there, too."""
        found, self.journal.found = self.journal.found, None        # is large
        device = next(self.parts["model"].parameters()).device
        if found:
            for name, part in self.parts.items():
                part.load_state_dict(found["parts"][name])
            self.first, rank = found["step"], processes()[0]
            if rank:                # the first one's numbers are its own
                torch.manual_seed(torch.initial_seed() + found["step"])
            else:
                torch.set_rng_state(found["random"])
                if device.type == "cuda" and found["random_cuda"] is not None:
                    torch.cuda.set_rng_state(found["random_cuda"], device)
            print(f"{self.title}: goes on after step {self.first:,} of {self.steps:,}", flush=True)
        self.began = self.last = time.perf_counter()
        self.bar = self.enter_context(tqdm(desc=self.title, total=self.steps, initial=self.first, unit="step",
                                           disable=quiet(), leave=False))
        return (found["step"], found["best"], found["best_score"]) if found else (0, None, -1.0)

    def done(self, step: int, loss: torch.Tensor, metrics: dict, best: tuple) -> None:
        """After a step: its loss and, where the model was validated, its metrics; best: the best state so far
        and its score. Raises DataError where the training has broken down, and Stopped."""
        last, self.last = self.last, time.perf_counter()
        self.check_seconds += [self.last - last] * bool(metrics)        # of steps that were validated
        if step % 50 == 0 or metrics or step == self.steps:     # not always: it waits for the device
            self.report(step, average(loss), metrics)
        number = of_any(max(self.signals, default=0))       # all processes stop after the same step
        if step == self.steps or number or self.journal.due():
            self.save(step, loss, best)
        if number:
            raise Stopped(number)
        self.bar.update()

    def save(self, step: int, loss: torch.Tensor, best: tuple) -> None:
        """Take a snapshot. Raises DataError where the training has broken down."""
        self.check_finite(step, loss.item(), self.parts["model"].parameters())
        state = {name: part.state_dict() for name, part in self.parts.items()}
        cuda = torch.cuda.get_rng_state(loss.device) if loss.is_cuda else None
        self.journal.save({"parts": state, "step": step, "best": best[0], "best_score": best[1],
                           "random": torch.get_rng_state(), "random_cuda": cuda})

    def check_finite(self, step: int, loss: float, weights: Iterable = ()) -> None:
        """Raises DataError where a loss or a weight is not finite. A step whose loss overflows in fp16 is
        skipped, and the loss is scaled by half from then on: it has broken down where that leads nowhere."""
        scaler, journal, place = self.parts["scaler"], self.journal, "nothing of it is kept"
        fine = np.isfinite(loss) or scaler.is_enabled() and scaler.get_scale() >= 1
        if fine and all(bool(weight.isfinite().all()) for weight in weights):
            return
        if journal.writes and journal.snapshot.exists():
            place = f"its state of before is in {journal.snapshot}"
        what = "a weight is not finite" if fine else f"the loss is {loss}"
        raise DataError(f"{self.title}: {what} at step {step:,} of {self.steps:,}; lower the rates or "
                        f"weights of this training ({place})")

    def left(self, step: int) -> str:
        """The time until this training and the next, which has as many validations, have ended."""
        n, took, checks = len(self.check_seconds), self.last - self.began, sum(self.check_seconds)
        pace = (took - checks) / max(step - self.first - n, 1)                  # seconds of a step alone
        check = checks / n - pace if n else 0.0                                 # and of a validation
        ahead = sum(other > step for other in self.checks)
        times = self.journal.afterwards         # how much longer the next training takes
        after = times * self.steps * pace + len(self.checks) * check if times else 0.0
        return tqdm.format_interval((self.steps - step) * pace + ahead * check + after)

    def report(self, step: int, loss: float, metrics: dict) -> None:
        """Note it, and show it on the bar or, where there is none, in a line."""
        self.check_finite(step, loss)
        skipped = {}
        if self.parts["scaler"].is_enabled():       # a fused optimiser counts only the steps that it took
            counts = [state["step"] for state in self.parts["optimiser"].state.values()]
            skipped["skipped for overflow in fp16"] = step - int(torch.stack(counts).max())
        known = {"loss": loss} if np.isfinite(loss) else {}
        self.journal.log({"step": step, **known, **skipped, **metrics})
        left = self.left(step)
        if metrics:
            self.validated = {"valid N@10": f"{metrics['N@10']:.4f}"}
            if self.bar.disable:                                                    # piped output has no bar
                print(f"  {self.title} step {step:,} of {self.steps:,}: loss {loss:.3f}, "
                      f"valid N@10 {metrics['N@10']:.4f}, about {left} left", flush=True)
        after = {"with the next": left} if self.journal.afterwards else {}
        self.bar.set_postfix({"loss": f"{loss:.3f}", **self.validated, **skipped, **after})


# ----------------------------------------------------------------------------------------- results to read

PAPER_R10 = {("Beauty", "tiger", "SFT"): 0.0558, ("Beauty", "tiger", "tb"): 0.0651,     # its Table 1
             ("Yelp", "tiger", "SFT"): 0.0334, ("Yelp", "tiger", "tb"): 0.0404}


@torch.no_grad()
def code_figures(codes: torch.Tensor, vectors: torch.Tensor, neighbours: int = 10,
                 probes: int = 4096) -> str:
    """What codes (N, L) are like, as a line: the share of used ones among a level's codes up to the highest;
    the collision rate, 1 - distinct rows / N; and the mean share of codes that an item has in common with
    each of its nearest items by the cosine of SASRec's vectors (N, d), over at most `probes` items."""
    unit, overlap = torch.nn.functional.normalize(vectors.float()), []
    rows = torch.linspace(0, len(codes) - 1, min(probes, len(codes)), device=codes.device).long()
    for row in rows.split(128):
        likeness = (unit[row] @ unit.T).scatter(1, row[:, None], -torch.inf)
        near = likeness.topk(min(neighbours, len(codes) - 1)).indices
        overlap.append((codes[near] == codes[row][:, None]).float().mean((1, 2)))
    usage = ", ".join(f"{len(column.unique()) / (int(column.max()) + 1):.0%}" for column in codes.T)
    collisions = 1 - len(codes.unique(dim=0)) / len(codes)
    return (f"{'':10}codes: usage {usage}; collision rate {collisions:.3f}; overlap with the {neighbours} "
            f"nearest items of SASRec {torch.cat(overlap).mean():.3f}")


def diversity(recommended: torch.Tensor, r_cs: torch.Tensor, data: Data) -> dict[str, float]:
    """How varied the top 10 of all users are (Section 4.5): recommended (U, W) item ids, best first, and the
    collaborative scores r_cs (U, 10) of the first ten.

    coverage: the share of the catalogue that anybody is recommended. KL, in nats: of the distribution of
    recommended items against the uniform one over the catalogue; 0 where all come equally often. std: of that
    distribution's probabilities, times N. r_cs: the mean over all, and the means over users of each list's
    range and standard deviation. rank: the mean popularity rank, 1 for the most popular item of the training.
    """
    top_items = recommended[:, :10].flatten().long().cpu()
    count = torch.bincount(top_items, minlength=data.n_items + 1)[:data.n_items]
    share = count.double() / count.sum()
    rank = 1 + popularity(data).argsort(descending=True, stable=True).argsort()
    return {"coverage": (count > 0).double().mean().item(),
            "KL": torch.special.xlogy(share, share * data.n_items).sum().item(),
            "std": (share * data.n_items).std(correction=0).item(), "r_cs mean": r_cs.mean().item(),
            "r_cs range": (r_cs.amax(1) - r_cs.amin(1)).mean().item(),
            "r_cs std": r_cs.std(1, correction=0).mean().item(), "rank": (share * rank).sum().item()}


def summary(run: Run, scores: Callable, r_cs: Callable) -> tuple[str, dict]:
    """The tables of a run that went through all stages, and its results: those of SFT instead of the method
    among them, where they are kept. scores: histories (B, T) -> every item's collaborative score (B, N);
    r_cs: those -> their collaborative rewards (B, N)."""
    popular = top(popularity(run.data)[None], 20).expand(run.data.n_users, -1)
    taken = run.data.items[run.data.offsets[1:] - 1]
    test = run.metrics(popular, taken)
    if run.data.liked is not None:
        test["liked"] = liked_unseen(popular, run.data)
    how, more = "only" if run.cfg.from_scratch else "then", run.more_sft()
    results = {"popularity": {"test": test, "top": popular, "taken": taken}, "SASRec": run.results["sasrec"],
               "SFT": run.results["sft"], **({f"{how} sft": more} if more else {}),
               f"{how} {run.cfg.loss}": run.results["finetune"]}
    parts = [results_table(run, results) + "\n" + less_sft([results])]
    if run.cfg.diversity:
        parts.append(diversity_table(run, results, scores, r_cs))
    if run.cfg.show:
        parts.append(case_studies(run, results, run.cfg.show))
    if run.cfg.plot and processes()[0] == 0:
        parts.append(f"drawn: {plot(run, results)}")
    return "\n\n".join(parts), results


def several_seeds(cfg) -> tuple[str, list[int]]:
    """The setting that --seeds or --finetune-seeds vary, and the values that they name. Raises DataError."""
    if cfg.seeds and cfg.finetune_seeds:
        raise DataError("--seeds and --finetune-seeds cannot go together; choose one")
    if cfg.finetune_seeds and cfg.fresh:
        raise DataError("--fresh would do the shared SFT again for each of --finetune-seeds; leave it "
                        "out, or name another --runs-dir")
    seeds, name = cfg.seeds or cfg.finetune_seeds, "seed" if cfg.seeds else "finetune_seed"
    flag = f"--{name.replace('_', '-')}s {seeds}"
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})+", seeds):
        raise DataError(f"{flag} is not a list of two or more whole numbers, as 42,43,44")
    values = list(map(int, seeds.split(",")))
    if len(set(values)) < len(values):
        raise DataError(f"{flag} names a seed twice; each must be another")
    return name, values


def for_each_seed(run_all: Callable, cfg) -> str:
    """The tables of run_all(settings) -> (tables, results); where --seeds or --finetune-seeds name several,
    they are printed run by run, and mean ± standard deviation over the runs is what is returned. Or a report
    of all that is kept, with --report. Raises DataError."""
    if cfg.report:
        return report(Path(cfg.runs_dir), type(cfg))
    with contextlib.redirect_stdout(Nowhere() if cfg.quiet else sys.stdout):
        if not cfg.seeds and not cfg.finetune_seeds:
            return run_all(cfg)[0]
        found, (name, seeds) = [], several_seeds(cfg)
        for seed in seeds:
            text, results = run_all(dataclasses.replace(cfg, **{name: seed}))
            print(f"{text}\n", flush=True)
            found.append(results)
    return f"{spread_table(found)}\n{less_sft(found)}"


def in_all(found: list[dict[str, dict]]) -> list[str]:
    """The labels that the results of all runs have."""
    return [label for label in found[0] if all(label in results for results in found)]


def spread_table(found: list[dict[str, dict]]) -> str:
    """Mean ± standard deviation (n - 1) of each result's test metrics over runs."""
    names = list(found[0]["popularity"]["test"])
    table = [[f"test, n = {len(found)}", *names, "valid R@10", "valid N@10"]]
    for label in in_all(found):
        row = [label]
        for part, name in (*(("test", name) for name in names), ("valid", "R@10"), ("valid", "N@10")):
            values = [results[label].get(part, {}).get(name) for results in found]
            row.append("" if None in values else f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
        table.append(row)
    return aligned(table)


def results_table(run: Run, results: dict[str, dict]) -> str:
    """The test metrics of each result side by side, the paper's R@10 where there is one, and the time."""
    names = list(results["popularity"]["test"])
    table = [["test", *names, "valid R@10", "valid N@10", "paper R@10", "seconds"]]
    papers = {} if run.cfg.codes else PAPER_R10             # the paper's are by codes of its own
    for label, result in results.items():
        paper = papers.get((run.data.name, run.cfg.backbone, label.removeprefix("then ")))
        valid = result.get("valid", {})
        values = [*(result["test"].get(name) for name in names), valid.get("R@10"), valid.get("N@10"), paper]
        table.append([label, *("" if value is None else f"{value:.4f}" for value in values),
                      f"{result['seconds']:.0f}" if "seconds" in result else ""])
    return aligned(table)


def less_sft(found: list[dict[str, dict]]) -> str:
    """A line for each result before the last one, from SFT on: the last one's test R@10 and N@10 less its, of
    one run or on average over several, and the standard error of that: the users are the same, so it is
    smaller than that of each. Where all runs have the same users, a user's mean over them counts once."""
    lines, gains = [], 1 / torch.log2(torch.arange(2, 12).double())
    *before, last = in_all(found)[2:]
    wanted = [results["popularity"]["taken"] for results in found]
    same = all(torch.equal(taken, wanted[0]) for taken in wanted)
    for label in before:
        differences = []
        for results, taken in zip(found, wanted):
            old, new = ((results[name]["top"][:, :10].cpu() == taken[:, None]).double()
                        for name in (label, last))
            hit = new - old                                                         # (U, 10)
            differences.append(torch.stack([hit.sum(1), hit @ gains[:hit.shape[1]]]))       # R@10, N@10
        per_user = torch.stack(differences).mean(0) if same else torch.cat(differences, 1)  # (2, U)
        users = per_user.shape[1]
        error = per_user.std(1, correction=min(1, users - 1)) / users ** 0.5
        recall, ndcg = (f"{mean:+.4f} ± {of:.4f}" for mean, of in zip(per_user.mean(1), error))
        whose = f"the same {users:,} users" if same else f"{users:,} users of {len(found)} runs"
        mean_of = f", mean of {len(found)} runs" if same and len(found) > 1 else ""
        lines.append(f"{whose}{mean_of}, {last} less {label}: R@10 {recall}, N@10 {ndcg} "
                     "(standard error)")
    return "\n".join(lines)


def diversity_table(run: Run, results: dict[str, dict], scores: Callable, r_cs: Callable) -> str:
    """`diversity` of each result's lists of the test users; scores, r_cs: as in `summary`."""
    lists = [result["top"][:, :min(10, run.data.n_items)].long() for result in results.values()]
    together, examples = torch.cat(lists, 1).to(run.device), run.parts["test"]
    found = torch.cat([r_cs(scores(examples.batch(rows)[0])).gather(1, together[rows]).cpu()
                       for rows in torch.arange(len(examples)).split(256)])
    figures = [diversity(items, part, run.data)
               for items, part in zip(lists, found.split([items.shape[1] for items in lists], 1))]
    rows = [[label, *(f"{value:.4g}" for value in row.values())] for label, row in zip(results, figures)]
    return aligned([["top 10", *figures[0]], *rows])


def case_studies(run: Run, results: dict[str, dict], n: int) -> str:
    """For n random test users: what they took, what came next, and the top 10 of SFT and of the last result
    side by side. A * marks what only the last one found, => the true next item."""
    titles = [title or f"item {i}" for i, title in enumerate(run.data.titles)] + ["-"]
    (left, before), (right, after) = ("SFT", results["SFT"]), list(results.items())[-1]
    generator, lines = torch.Generator().manual_seed(run.cfg.seed), []
    for user in torch.randperm(run.data.n_users, generator=generator)[:n].tolist():
        sequence = run.data.items[run.data.offsets[user]:run.data.offsets[user + 1]].tolist()
        history = sequence[-1 - run.cfg.max_history:-1]
        lines += [f"user {user}", *(f"   {titles[item][:90]}" for item in history),
                  f"=> {titles[sequence[-1]][:90]}", f"   {left:<44}   {right}"]
        lists = before["top"][user, :10].tolist(), after["top"][user, :10].tolist()
        for pair in zip(*lists):
            marks = ["=>" if item == sequence[-1] else "  " for item in pair]
            marks[1] = "*" + marks[1][1:] if pair[1] not in lists[0] and marks[1] != "=>" else marks[1]
            lines.append(f"{marks[0]} {titles[pair[0]][:44]:<44}{marks[1]} {titles[pair[1]][:44]}")
        lines.append("")
    return "\n".join(lines[:-1])


def noted(folder: Path) -> list[dict]:
    """The entries of a stage's metrics.jsonl. Raises DataError where a line is damaged."""
    path = folder / "metrics.jsonl"
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove that folder to do the stage again") from None
    return [entry for entry in entries if isinstance(entry, dict)]


def plot(run: Run, results: dict[str, dict]) -> Path:
    """Draw each training's loss and validation N@10 over time, and each result's test R@10 -> the image's
    path, in the folder of the last stage."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.switch_backend("agg")                    # into a file, without a screen
    figure, (losses, curves, bars) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for stage, label in zip(("sasrec", "sft", "finetune"), ("SASRec", "SFT", list(results)[-1])):
        steps = [entry for entry in noted(run.folder(stage)) if "step" in entry]
        for axes, name in ((losses, "loss"), (curves, "N@10")):
            points = [(entry["seconds"] / 60, entry[name]) for entry in steps if name in entry]
            axes.plot(*zip(*points), label=label, marker="." if len(points) < 40 else "")
    bars.barh(list(results), [result["test"]["R@10"] for result in results.values()])
    bars.invert_yaxis()
    for axes, title in ((losses, "loss"), (curves, "validation N@10"), (bars, "test R@10")):
        axes.set_title(f"{run.data.name}: {title}")
    for axes in (losses, curves):
        axes.set_xlabel("minutes of this training")
        axes.legend()
    path = run.folder("finetune") / "curves.png"
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
    write_atomically(path, image.getvalue())
    return path


class Finished(NamedTuple):
    """A trained model that is kept, as its folder tells of it."""
    dataset: str        # the folder's name
    label: str          # SASRec, SFT, or the fine-tuning method
    config: dict        # the settings that it depends on
    common: dict        # those of them that are not the default and no ablation
    variant: dict       # those that are an ablation
    test: dict          # its metrics on the test users: R@5, R@10, N@5, N@10
    made_from: dict     # hashes of its data, and of files of codes or vectors


VARIANTS = [{}, *({"reward": parts} for parts in ("aug", "cf", "sim", "aug,cf", "aug,sim", "cf,sim")),
            {"sampler": "random"}, {"sampler": "none"}, {"confidence": False}]      # of the paper's Table 2
ABLATED = ("reward", "sampler", "confidence", "k", "lam", "z")          # settings that rows of it differ in


def finished(runs: Path, settings: type) -> list[Finished]:
    """All trained models that are kept under `runs`, in the order of their folders' names."""
    models = []
    for path in sorted(runs.glob("*/*/checkpoint.pt")):
        try:
            last = noted(path.parent)[-1:]
            if not last or "test" not in last[0]:
                continue
            config = read_config(path.parent)
            test = {name: float(last[0]["test"][name]) for name in ("R@5", "R@10", "N@5", "N@10")}
            default = {f.name: f.default for f in dataclasses.fields(settings)}
            default.update(PRESETS.get(config["dataset"], {}))
            changed = {name: value for name, value in config.items() if value != default.get(name)
                       and name not in ("dataset", "seed", "finetune_seed", "loss", "backbone", "precision",
                                        "made_from")}
            label = config.get("loss") or {"sasrec": "SASRec", "sft": "SFT"}[path.parent.name.split("-")[0]]
            ablated = ABLATED if label in ("db", "tb") else ()          # Table 2 has no others
            made_from = {name: str(of) for name, of in dict(config.get("made_from", {})).items()
                         if name in config and (name, config["dataset"]) != ("dataset", "toy")}    # a seed's
            int(config["seed"])
        except (DataError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
            print(f"warning: {path.parent} is left out: its notes are damaged ({error!r})", file=sys.stderr)
            continue
        models.append(Finished(path.parts[-3], label, config,
                               {name: value for name, value in changed.items() if name not in ablated},
                               {name: value for name, value in changed.items() if name in ablated},
                               test, made_from))
    return models


def flags(changed: dict) -> str:
    """Settings as they are typed."""
    return " ".join(f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
                    + ("" if isinstance(value, bool) else f" {shlex.quote(str(value))}")
                    for name, value in changed.items())


def cells(models: list[Finished], names: tuple[str, ...], paper: float | None = None) -> list[str]:
    """Mean and standard deviation of metrics over seeds, the paper's R@10 in brackets, and how many seeds
    there are. Models of one seed (of two precisions, or seeds of the fine-tuning) count as their mean."""
    seeds, texts = {model.config["seed"] for model in models}, []
    for name in names:
        values = [np.mean([model.test[name] for model in models if model.config["seed"] == seed])
                  for seed in sorted(seeds)]
        spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
        texts.append((f"{np.mean(values):.4f}{spread}" if values else "")
                     + (f" [{paper:.4f}]" if paper and name == "R@10" else ""))
    return [*texts, str(len(seeds) or "")]


def markdown(table: list[list[str]]) -> list[str]:
    """Rows of cells, the first of them the head, as the lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in [table[0], ["---"] * len(table[0]), *table[1:]]] + [""]


def papers_tables(models: list[Finished], losses: tuple[str, ...], figures: dict) -> list[str]:
    """Lines of the paper's two tables, from models that differ in backbone, method, ablation and seed;
    figures: the paper's R@10 by dataset, backbone and method."""
    def find(backbone: str, label: str, variant: dict) -> list[Finished]:
        return [model for model in models if (model.label, model.variant) == (label, variant)
                and model.config.get("backbone", backbone) == backbone]

    names, backbones = ("R@5", "R@10", "N@5", "N@10"), ("tiger", "letter")
    first = [["--backbone", "--loss", *names, "n"], ["", "SASRec", *cells(find("", "SASRec", {}), names)]]
    first += [[backbone, label, *cells(find(backbone, label, {}), names,
                                       figures.get((models[0].dataset, backbone, label)))]
              for backbone in backbones for label in ("SFT", *losses)]
    columns = [(backbone, loss) for backbone in backbones for loss in ("db", "tb")]
    second = [["ablation", *(head for column in columns
                             for head in (f"{' '.join(column)} R@10", "N@10", "n"))]]
    others = [model.variant for model in models if model.variant not in VARIANTS]
    for variant in [*VARIANTS, *(other for i, other in enumerate(others) if other not in others[:i])]:
        row = [cells(find(*column, variant), ("R@10", "N@10")) for column in columns]
        second.append([f"`{flags(variant)}`" if variant else "none", *itertools.chain.from_iterable(row)])
    return ["Table 1", "", *markdown(first), "Table 2", "", *markdown(second)]


def report(runs: Path, settings: type) -> str:
    """The paper's Tables 1 and 2 as Markdown, from what is kept under `runs`: for each dataset, and each set
    of further flags that was tried on it, mean ± standard deviation over the seeds, the paper's figure in
    brackets, and empty cells where nothing was run. Raises DataError where nothing is kept."""
    models, lines = finished(runs, settings), []
    if not models:
        raise DataError(f"{runs} holds no finished training; train first, or name another --runs-dir")
    losses = next(f.metadata["choices"] for f in dataclasses.fields(settings) if f.name == "loss")
    done = []
    for model in sorted(models, key=lambda model: {"SFT": 1, "SASRec": 2}.get(model.label, 0)):
        if model in done:                                       # SFT and SASRec stand with the others
            continue
        whole = {**model.common, **model.made_from}             # of files the content counts, not the path
        members = [other for other in models if other.dataset == model.dataset
                   and {**other.common, **other.made_from} == {
                       name: value for name, value in whole.items() if name in other.config}]
        command = f"python gflowgr.py {flags({'dataset': model.config['dataset'], **model.common})}"
        lines += [f"## {model.dataset}: `{command} ..`", "", *papers_tables(
            members, losses, {} if "codes" in model.common else PAPER_R10)]
        done += members
    return "\n".join(lines).rstrip()


# -------------------------------------------------------------------------------------------- command line

def knob(default, group: str, text: str, choices: tuple = (), low: float | None = None, below: float = 1e9):
    """A field of a dataclass of settings: its default, the group of settings that it belongs to, its meaning,
    and what it may be."""
    low = low if low is not None else 1 if type(default) is int else 0
    return dataclasses.field(default=default, metadata=dict(
        group=group, help=text, choices=choices, low=low, below=below))


@dataclass(frozen=True)
class RunSettings:
    """Settings of the data, of how a training is watched, and of where results go."""
    dataset: str = knob("toy", "data", "toy, beauty, yelp, instruments, or a folder of your own")
    seed: int = knob(42, "data", "fixes all random choices, on a CPU with as many threads all digits", low=0)
    finetune_seed: int = knob(-1, "finetune", "seed of the fine-tuning alone; -1: the same as --seed", low=-1)
    item_vectors: str = knob("", "vectors", "a .npy file of your own item vectors, not TF-IDF + SVD")
    vector_dim: int = knob(128, "vectors", "dimensions of the TF-IDF + SVD item vectors [ours]")
    evaluations: int = knob(8, "training", "how often a training is validated (NDCG@10) [ours]", below=1000)
    valid_users: int = knob(4000, "training", "users of these validations; at the end all count [ours]")
    precision: str = knob("auto", "training", "of matrix products", ("auto", "bf16", "fp16", "fp32"))
    seeds: str = knob("", "run", "as 42,43,44: a run for each, then mean and standard deviation over them")
    finetune_seeds: str = knob("", "run", "the same, of the fine-tuning alone: all from the SFT of --seed")
    data_dir: str = knob("data", "run", "where the datasets lie")
    runs_dir: str = knob("runs", "run", "where every stage's result is kept")
    device: str = knob("auto", "run", "auto (CUDA where there is one), cpu, cuda or cuda:N")
    compile: bool = knob(False, "run", "compile the generator's blocks by torch.compile; slower on a CPU")
    save_every: float = knob(180.0, "run", "seconds between two snapshots of a training's whole state")
    fresh: bool = knob(False, "run", "start over: do all stages again, whatever is kept of them")
    diversity: bool = knob(False, "run", "also print how varied each top 10 is (Section 4.5)")
    show: int = knob(0, "run", "also print the history and the top 10 of this many test users", low=0)
    plot: bool = knob(False, "run", "also draw learning curves and R@10 beside the run; needs matplotlib")
    report: bool = knob(False, "run", "only print the paper's Tables 1 and 2, from what lies in --runs-dir")
    quiet: bool = knob(False, "run", "print nothing but the final tables")


class Parser(argparse.ArgumentParser):
    """A parser that answers a mistake with one sentence, the nearest flag in it, and exit code 2."""

    def error(self, message: str):
        if processes()[0]:                          # the first one says it
            self.exit(2)
        wrong = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        close = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        self.exit(2, f"error: {message}{f' (did you mean {close[0]}?)' if close else ''}; see --help\n")


def command_line(settings: type, argv: list[str] | None, prog: str, about: str):
    """An instance of the dataclass `settings` from the command line: one flag for each field, whose metadata
    hold "help", "group", "choices", "low" and "below"; PRESETS are other defaults for a --dataset."""
    fields = {"--" + f.name.replace("_", "-"): f for f in dataclasses.fields(settings)}
    parser = Parser(prog=prog, usage=f"python {prog} [--SETTING VALUE ...]", description=about,
                    allow_abbrev=False)
    names = dict.fromkeys(f.metadata["group"] for f in fields.values())
    groups = {name: parser.add_argument_group(name) for name in names}
    for flag, f in fields.items():
        others = "".join(f", {name}: {other[f.name]}" for name, other in PRESETS.items() if f.name in other)
        default = "none" if f.default == "" else f.default
        text = f"{f.metadata['help']} (default: {default}{others})".replace("%", "%%")
        kind = {"type": type(f.default), "choices": f.metadata["choices"] or None,
                "metavar": "|".join(f.metadata["choices"]) or "VALUE"}
        groups[f.metadata["group"]].add_argument(flag, default=f.default, help=text, **(
            {"action": argparse.BooleanOptionalAction} if type(f.default) is bool else kind))
    parser.set_defaults(**PRESETS.get(parser.parse_args(argv).dataset, {}))
    values = vars(parser.parse_args(argv))
    for flag, f in fields.items():
        low, below = f.metadata["low"], f.metadata["below"]
        if type(f.default) in (int, float) and not low <= values[f.name] < below:
            parser.error(f"{flag} {values[f.name]} must be at least {low} and below {below:g}")
    return settings(**values)


def explain(error: Exception) -> str:
    """One sentence for what can go wrong outside of the program's control."""
    if isinstance(error, DataError):
        return f"error: {error}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror or error}{place}; finished stages are kept, half-written ones not"
    if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
        reason = str(error).strip().splitlines()[-1][:150] if str(error) else "out of memory"
        return f"error: not enough memory ({reason}); lower the sizes, as --batch"
    if processes()[1] > 1 and re.search("gloo|NCCL|Connection", str(error)):
        return f"error: another process ended ({str(error).strip().splitlines()[-1][:150]})"
    raise error  # a bug of this program: the traceback helps to find it


def drop_unwritten(stream) -> None:
    """Forget what a stream cannot write, as to a full disk: Python would try again, and fail, at its end."""
    try:
        if stream is not None:              # closed from the start
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def guarded(command: Callable[[], str]) -> int:
    """Run a command, print what it returns or one sentence of what went wrong; returns the exit code: 0, 1
    for bad input, 130 for Ctrl-C, 143 for SIGTERM. Of several processes the first of a machine speaks of the
    input, and each of faults of its own."""
    leads, together = processes()[0] == 0, False
    for stream in (sys.stdout, sys.stderr):     # what a terminal has no letters for is shown as ?
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")
    try:
        with on_signals(stop), contextlib.redirect_stdout(sys.stdout if leads else Nowhere()):
            print(command(), flush=True)
        together = True
        return 0
    except (DataError, OSError, MemoryError, RuntimeError) as error:
        cut_off = re.search("gloo|NCCL|Connection", str(error))             # from a process that ended first
        first = os.environ.get("LOCAL_RANK") == "0"
        if leads or not cut_off and (first or not isinstance(error, DataError)):
            print(explain(error), file=sys.stderr)
        drop_unwritten(sys.stdout)
        return 1
    except KeyboardInterrupt as stopped:
        together = isinstance(stopped, Stopped)
        if leads:
            print("\nstopped: the same command goes on from here, unless with --fresh", file=sys.stderr)
        return 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
    finally:
        if dist.is_initialized() and (together or dist.get_backend() == "gloo"):
            dist.destroy_process_group()            # NCCL's waits for the others, and these for this one


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
    parser = Parser(prog="data.py", allow_abbrev=False,
                    description="Bring and check a dataset, and print its figures.")
    parser.add_argument("dataset", help=f"toy, {', '.join(DATASETS)}, or the path of a folder of your own")
    parser.add_argument("--data-dir", type=Path, default="data", help="where NAME/ lies (default: data)")
    args = parser.parse_args(argv)
    return guarded(lambda: describe(load(args.dataset, args.data_dir)))


if __name__ == "__main__":
    sys.exit(main())

"""What goes into GFlowGR, and how what comes out is judged; this file knows no model.

    python data.py beauty              download and check a dataset, print its figures
    python data.py path/to/Name        a folder in LETTER's format: Name.inter.json, Name.item.json
    python data.py path/to/clicks.csv  a table of your own: user, item, timestamp

LETTER publishes the datasets of the paper in two files each:

    NAME.inter.json   {"0": [0, 1, 2], ...}                            user -> item ids, oldest first
    NAME.item.json    {"0": {"title": "...", "description": "..."}}    item id -> text, ids 0 .. N - 1

In order: download, read, the toy world, split and batches; item vectors, codes; metrics, tables.
Shapes: U users, N items, E examples, B histories in a batch, T items in a history, L codes of an item.
"""
from __future__ import annotations

import ast
import collections
import csv
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import re
import sys
import time
import unicodedata
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

URL = ("https://raw.githubusercontent.com/HonghuiBao2000/LETTER/"
       "8d0154e28de37dbb6e24871c508ad8ddb1921cda/data")
DATASETS = {            # --dataset -> folder, and the git blob id of each file, which its content must have
    "beauty": ("Beauty", {"inter": "9378c6e88224ebd22e57325d89edb8cfb73291ac",
                          "item": "098205baf4a483b818507dc98c4b9bc9151a69f0",
                          "index": "6711ba430c7a6889e60f908554f72aae8a038039"}),
    "yelp": ("Yelp", {"inter": "c80dd3c4131613d694e6be909f0485fcec3b87e3",
                      "item": "5e19bf60af056342e80a564cd6a8859a4faa236e",
                      "index": "6198e401fc8733f8cf26051a8a5133f3fee0b3ed"}),
    "instruments": ("Instruments", {"inter": "89733901ab247616059e03c620bf3edff59bc549",
                                    "item": "e1b565483dc55f63dc260aab13d0b3e1d73420fd"}),
}


class DataError(Exception):
    """Something is wrong with the input; the message is a sentence: what, where, and what to do."""


class Data(NamedTuple):
    """A loaded dataset. Item ids are 0 .. N - 1; the id N pads short histories."""
    name: str
    titles: list        # (N,) for people
    texts: list         # (N,) title and description, for the item vectors
    items: torch.Tensor             # (interactions,) all sequences one after the other, oldest first
    offsets: torch.Tensor           # (U + 1,) user u's sequence is items[offsets[u]:offsets[u + 1]]
    ids: list | None                # (N,) the user's own item ids, where they are not the numbers
    liked: torch.Tensor | None      # (U, N) what each user truly likes; only the toy world knows
    fingerprint: str                # a hash of all of it

    @property
    def n_items(self):
        return len(self.texts)

    @property
    def n_users(self):
        return len(self.offsets) - 1


# ----------------------------------------------------------------------------------------- download

def git_blob_id(content):
    """The id under which git stores bytes: 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_atomically(path, content):
    """Write bytes to a file so that it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_tensors(path, content):
    """Write tensors and plain values, nested as they may be."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load_tensors(path):
    """What `save_tensors` wrote, {} where nothing was; none of it runs as code.
    Raises DataError."""
    if not path.exists():
        return {}
    content = io.BytesIO(path.read_bytes())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception:       # a damaged file fails in many ways; to the user each means the same
        raise DataError(f"{path} is damaged; remove it and run the same command") from None


def fingerprint(value):
    """A hash of settings and tensors, however nested: 10 hex digits."""
    def of_tensor(x):
        return hashlib.sha1(x.numpy(force=True).tobytes()).hexdigest()

    text = json.dumps(value, sort_keys=True, default=of_tensor)
    return hashlib.sha1(text.encode()).hexdigest()[:10]


def code_hash(*paths):
    """A hash of what Python files do, comments and docstrings apart."""
    trees = [ast.parse(Path(path).read_text(encoding="utf-8")) for path in paths]
    for node in itertools.chain(*map(ast.walk, trees)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return fingerprint([ast.dump(tree) for tree in trees])


def add_line(path, entry):
    """Add a line to a .jsonl file."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def fetch(url, tries=3, timeout=30.0, pause=2.0):
    """The body behind a URL. Where the connection breaks it is tried again. Raises DataError."""
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return response.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = error
        if left:
            time.sleep(pause)
    raise DataError(f"could not fetch {url} ({reason}); put the file into the folder of --data-dir by "
                    "hand, or use --dataset toy, which needs no network")


def download(dataset, data_dir, kinds=("inter", "item"), base_url=URL):
    """Bring the files of a built-in dataset into data_dir/NAME -> that folder. A file that lies there is
    used as it is; what is downloaded must have the content of its git blob id. Raises DataError."""
    name, blob_ids = DATASETS[dataset]
    folder = Path(data_dir) / name
    for kind in kinds:
        path = folder / f"{name}.{kind}.json"
        if path.exists():
            continue
        url = f"{base_url}/{name}/{path.name}"
        print(f"downloading {url}", flush=True)
        content = fetch(url)
        if git_blob_id(content) != blob_ids[kind]:
            raise DataError(f"{url} is not the file that is expected (git blob id {blob_ids[kind]}); "
                            f"nothing was kept: try again, or put it at {path} by hand")
        write_atomically(path, content)
    return folder


def ready_codes(codes, dataset, data_dir, n_items):
    """The codes (N, L) that --codes names: of a file, or, with `letter`, those that LETTER
    published. Raises DataError."""
    if codes != "letter":
        return read_codes(Path(codes), n_items)
    if "index" not in DATASETS.get(dataset, ("", {}))[1]:
        raise DataError(f"--codes letter is known for beauty and yelp, not for {dataset}; give "
                        "the path of a NAME.index.json, or leave --codes out")
    folder = download(dataset, data_dir, ("index",))
    return read_codes(folder / f"{folder.name}.index.json", n_items)


# --------------------------------------------------------------------------------------------- read

def load(dataset, data_dir=Path("data"), seed=42):
    """Load `toy`, a built-in dataset (downloaded if missing), or a user's own folder or table -> Data.
    Raises DataError."""
    path = Path(dataset)
    if dataset == "toy":
        return toy(seed)
    if dataset in DATASETS:
        path = download(dataset, data_dir)
    if path.is_dir():
        return read_folder(path)
    if path.is_file() and path.suffix in (".csv", ".tsv", ".inter"):
        return read_interactions(path)
    raise DataError(f"unknown dataset {dataset!r}: choose toy, {', '.join(DATASETS)}, a folder Name with "
                    "Name.inter.json and Name.item.json, or a table .csv, .tsv or .inter")


def bundle(name, titles, texts, sequences, ids=None, liked=None):
    """Sequences of item ids, one for each user -> Data. Users of fewer than 3 items are left out."""
    long = [sequence for sequence in sequences if len(sequence) >= 3]
    if len(long) < len(sequences):
        print(f"{name}: {len(sequences) - len(long)} users with fewer than 3 interactions are left out")
    if max(map(len, long), default=0) < 4:
        raise DataError(f"{name}: no user has the 4 interactions that a training pair needs")
    lengths = torch.tensor([0] + [len(sequence) for sequence in long])
    items = torch.tensor(list(itertools.chain.from_iterable(long)))
    offsets = lengths.cumsum(0)
    key = json.dumps([texts, ids]).encode() + items.numpy().tobytes() + offsets.numpy().tobytes()
    return Data(name, titles, texts, items, offsets, ids, liked, git_blob_id(key))


def shown(value):
    """A value as a message shows it: at most 80 characters of one line."""
    return json.dumps(value, ensure_ascii=False)[:80]


def read_json(path):
    """A JSON object of at least one entry from a file. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} does not exist, or is not a file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); replace it with a whole copy") from None
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path} must hold a JSON object with at least one entry, as {{"0": ...}}')
    return content


def read_folder(folder):
    """Read and check NAME/NAME.inter.json and NAME/NAME.item.json -> Data. Raises DataError."""
    name = Path(os.path.abspath(folder)).name
    path = folder / f"{name}.item.json"
    entries = read_json(path)
    titles, texts = [], []
    for item in map(str, range(len(entries))):
        if item not in entries:
            raise DataError(f'{path}: item "{item}" has no entry; {len(entries)} items have the ids "0" to '
                            f'"{len(entries) - 1}"')
        entry = entries[item]
        parts = [entry.get("title"), entry.get("description")] if isinstance(entry, dict) else [entry]
        if len(parts) < 2 or not all(part is None or isinstance(part, str) for part in parts):
            raise DataError(f'{path}: item "{item}" must be {{"title": text, "description": text}}, not '
                            f"{shown(entry)}")
        titles.append((parts[0] or "").strip())
        texts.append(" ".join(part or "" for part in parts).strip())
    path = folder / f"{name}.inter.json"
    sequences = read_json(path)
    for user, sequence in sequences.items():
        if not isinstance(sequence, list):
            raise DataError(f'{path}: user "{user}" must have a list of item ids, not {shown(sequence)}')
        for item in sequence:
            if type(item) is not int:
                raise DataError(f'{path}: user "{user}" has the item {shown(item)}, which is a '
                                f"{type(item).__name__}; an item id is a whole number, as 6")
            if not 0 <= item < len(texts):
                raise DataError(f'{path}: user "{user}" has the item {item}, which is not in the catalogue '
                                f"(ids 0 to {len(texts) - 1})")
    return bundle(name, titles, texts, list(sequences.values()))


def read_table(path, names, needed):
    """The rows of a .csv, .tsv or .inter as tuples of the columns `names`, the first `needed` of which
    must be there: by a header (user, user_id, user_id:token ..), else in this order. Raises DataError."""
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        lines = content.decode(encoding).splitlines(keepends=True)
        rows = list(csv.reader(lines, delimiter="," if path.suffix == ".csv" else "\t"))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} is not a table ({error}); save it as UTF-8 text") from None
    rows = [(number, row) for number, row in enumerate(rows, 1) if row]
    if not rows:
        raise DataError(f"{path} is empty")
    head = [cell.split(":")[0].strip().lower().removesuffix("_id") for cell in rows[0][1]]
    places = list(range(len(names)))
    if set(names[:needed]) <= set(head):
        places = [head.index(name) if name in head else None for name in names]
        rows = rows[1:]
    found = []
    for number, row in rows:
        if len(row) <= max(place for place in places[:needed]):
            raise DataError(f"{path}, line {number}: {needed} columns are needed ({', '.join(names)}), and "
                            f"there are {len(row)}: {shown(row)}")
        found.append((number, *(row[place].strip() if place is not None and place < len(row) else ""
                                for place in places)))
    return found


def read_interactions(path):
    """Read a table of user, item, timestamp, and NAME.items.csv (item, title, description) where it lies
    beside it -> Data; a user's items are sorted by time, equal times as in the file. Raises DataError."""
    clicks = collections.defaultdict(list)
    for number, user, item, when in read_table(path, ("user", "item", "timestamp"), 3):
        try:
            clicks[user].append((float(when), item))
        except ValueError:
            raise DataError(f"{path}, line {number}: the timestamp {shown(when)} is not a number; columns "
                            "are user, item, timestamp, in this order or as a header names them") from None
    titles, texts = {}, {}
    beside = path.with_name(f"{path.stem}.items.csv")
    if beside.exists():
        for _, item, title, description in read_table(beside, ("item", "title", "description"), 2):
            titles[item] = title
            texts[item] = f"{title} {description}".strip()
    ids = sorted({item for pairs in clicks.values() for _, item in pairs} | set(texts))
    number = {item: i for i, item in enumerate(ids)}
    sequences = []
    for user in sorted(clicks):
        in_order = sorted(clicks[user], key=lambda pair: pair[0])
        sequences.append([number[item] for _, item in in_order])
    return bundle(path.stem, [titles.get(item) or item for item in ids],
                  [texts.get(item, "") for item in ids], sequences, ids)


def toy(seed=42, n_users=2000, n_items=600, n_categories=15, n_brands=20):
    """A small world whose users' true tastes are known. Each user has favourite categories and brands, each
    item an appeal of its own. Sequences of 5 to 20 items are drawn, none twice, from the softmax of that,
    with a pull to the category of the item before. `liked`: a user's 5 % most preferred items."""
    rng = np.random.default_rng(seed)
    category = rng.integers(n_categories, size=n_items)
    brand = rng.integers(n_brands, size=n_items)
    taste_category = 3.0 * (rng.random((n_users, n_categories)).argsort(1) < 2)
    taste_brand = 2.0 * (rng.random((n_users, n_brands)).argsort(1) < 3)
    preference = taste_category[:, category] + taste_brand[:, brand]
    preference = preference + rng.normal(0, 0.7, n_items)                           # (U, N)
    lengths = np.clip(rng.geometric(0.25, n_users) + 4, 5, 20)
    seen = np.zeros((n_users, n_items), bool)
    chosen = []
    for step in range(lengths.max()):
        pull = 1.5 * (category == category[chosen[-1]][:, None]) if step else 0.0
        noise = rng.gumbel(size=preference.shape)       # the argmax of logits + noise is a draw
        chosen.append(np.where(seen, -np.inf, preference + pull + noise).argmax(1))
        seen[np.arange(n_users), chosen[-1]] = True
    sequences = [row[:n].tolist() for row, n in zip(np.stack(chosen, 1), lengths)]
    titles = [f"brand{b} product{i} of category{c}" for i, (b, c) in enumerate(zip(brand, category))]
    texts = [f"{title} kind{c} style{c} maker{b} tone{rng.integers(40)}"
             for title, c, b in zip(titles, category, brand)]
    liked = preference >= np.quantile(preference, 0.95, axis=1, keepdims=True)
    return bundle("toy", titles, texts, sequences, liked=torch.from_numpy(liked))


def check_size(data, max_history, k, pool=512):
    """Raises DataError where a pool may hold fewer than k items that a user has not clicked."""
    longest = min(max_history, int(data.offsets.diff().max()))
    free = min(pool, data.n_items) - longest - 1
    if free < k:
        raise DataError(f"each history needs {k} unclicked items, and of a pool of "
                        f"{min(pool, data.n_items)} items only {max(free, 0)} surely are; change --k, "
                        "or --max-history")


# --------------------------------------------------------------------------------- split and batches

class Examples(NamedTuple):
    """E histories, items[start[e]:end[e]], and what follows them: the item after each of them, or, where
    `every` says so, the item after each item. The items lie on the device of the model."""
    items: torch.Tensor     # (interactions + 1,) the last is the padding, N
    start: torch.Tensor     # (E,)
    end: torch.Tensor       # (E,)
    every: bool = False

    @property
    def length(self):
        return self.end - self.start

    def target(self, rows):
        """The item after each history: (B,)."""
        return self.items[self.end[rows].to(self.items.device)]

    def batch(self, rows, width=None):
        """Histories (B, T), padded on the right to `width` or to the longest of them, and targets (B,), or
        (B, T) where every item has one."""
        start = self.start[rows][:, None]
        end = self.end[rows][:, None]
        position = start + torch.arange(width or int((end - start).max()))          # (B, T)
        padding = len(self.items) - 1
        history = torch.where(position < end, position, padding)
        following = torch.where(position < end, position + 1, padding) if self.every else end[:, 0]
        device = self.items.device
        return self.items[history.to(device)], self.items[following.to(device)]


def split(data, max_history=20, device="cpu"):
    """Leave-one-out: a user's last item is the test target, the one before it the validation target, each
    earlier one but the first a training target, after the last `max_history` items before it.
    -> {"train", "valid", "test": Examples}; those of "valid" and "test" are in the order of the users."""
    first = data.offsets[:-1]
    last = data.offsets[1:] - 1
    user = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())
    position = torch.arange(len(data.items))
    in_training = (position > first[user]) & (position < last[user] - 1)
    ends = {"train": position[in_training], "valid": last - 1, "test": last}
    items = F.pad(data.items, (0, 1), value=data.n_items).to(device)
    return {part: Examples(items, torch.maximum(first[user[end]], end - max_history), end)
            for part, end in ends.items()}


def windows(data, length=20, device="cpu"):
    """The training targets once more, each once, in as few rows: each user's training sequence, cut from
    its end on into windows of `length` items -> Examples."""
    pairs = split(data, length, device)["train"]
    user = torch.searchsorted(data.offsets, pairs.end, right=True)
    count = torch.unique_consecutive(user, return_counts=True)[1]
    behind = torch.repeat_interleave(count.cumsum(0), count) - 1 - torch.arange(len(user))
    row = behind % length == 0
    return Examples(pairs.items, pairs.start[row], pairs.end[row], every=True)


def batches(lengths, batch, seed, alike):
    """Rows of batches, without end: each row once a pass, always `batch` of them; what is left over opens
    the next pass. alike: histories of like length together, so that little is padded."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.empty(0, dtype=torch.long)
    while True:
        rows = torch.cat([left, torch.randperm(len(lengths), generator=generator)])
        full = len(rows) // batch * batch
        rows, left = rows[:full], rows[full:]
        if alike:
            rows = rows[torch.argsort(lengths[rows], stable=True)]
        chunks = rows.split(batch)
        for i in torch.randperm(len(chunks), generator=generator).tolist():
            yield chunks[i]


# ----------------------------------------------------------------------------- item vectors and codes

MARKS = "".join(chr(i) for i in range(0x300, 0x20000) if unicodedata.category(chr(i))[0] == "M")
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
#            Thai, Lao       Burmese        Khmer          kana           Chinese characters


def words(text):
    """The words of a text in any script; of scripts without spaces between words, pairs of characters."""
    text = unicodedata.normalize("NFKC", text).lower()
    found = []
    for word in re.findall(rf"[{UNSPACED}]+|[^\W{UNSPACED}{MARKS}][^\W{UNSPACED}]*", text):
        if re.match(rf"[{UNSPACED}]", word):
            found += [word[i:i + 2] for i in range(max(len(word) - 1, 1))]
        else:
            found.append(word)
    return found


def text_vectors(texts, dim=128, seed=42):
    """TF-IDF over words, then a truncated SVD: (N, dim), mean square 1. A word of one item alone says
    nothing about likeness and is left out; items without any other get zeros, which a line tells."""
    number = collections.defaultdict(itertools.count().__next__)        # of each word, as they come
    found = [np.array([number[word] for word in words(text)], np.int64) for text in texts]
    row = np.repeat(np.arange(len(texts)), [len(each) for each in found])
    pair, count = np.unique(row * len(number) + np.concatenate(found), return_counts=True)
    row, word = np.divmod(pair, max(len(number), 1))
    frequency = np.bincount(word, minlength=len(number))                # in how many items
    shared = frequency[word] > 1
    row, word, count = row[shared], word[shared], count[shared]

    vectors = torch.zeros(len(texts), dim)
    empty = len(texts) - len(np.unique(row))
    if empty:
        print(f"note: {empty:,} of {len(texts):,} items have no word that another item has, so their "
              "vectors are zero; --item-vectors or --codes brings better ones")
    if empty == len(texts):
        return vectors
    value = (1 + np.log(count)) * np.log(len(texts) / frequency[word])
    norm = np.sqrt(np.bincount(row, value ** 2, minlength=len(texts)))
    value = value / np.maximum(norm[row], 1e-12)
    column = np.unique(word, return_inverse=True)[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)                                         # svd_lowrank draws its probes
        matrix = torch.sparse_coo_tensor(np.stack([row, column]), value, dtype=torch.float32,
                                         size=(len(texts), int(column.max()) + 1))
        rank = min(dim, *matrix.shape)
        left, scale, _ = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
    vectors[:, :rank] = left[:, :rank] * scale[:rank]
    return vectors / vectors.square().mean().sqrt().clamp(min=1e-12)


def item_vectors(data, own, collaborative):
    """Item vectors (N, d): the user's own, or of the texts, or, without any text, SASRec's (N, dim)."""
    if own is not None:
        return own
    if any(data.texts):
        return text_vectors(data.texts)
    print("the items have no texts: their vectors are SASRec's own")
    return principal_vectors(collaborative, collaborative.shape[1])


def principal_vectors(x, dim):
    """The first principal components of rows (N, d) -> (N, dim), mean square 1, zeros where dim > d."""
    left, scale, _ = torch.linalg.svd((x - x.mean(0)).float(), full_matrices=False)
    x = F.pad(left * scale, (0, max(0, dim - left.shape[1])))[:, :dim]
    return x / x.square().mean().sqrt().clamp(min=1e-12)


def read_vectors(path, n_items):
    """A user's own item vectors (N, d) from a .npy file, rows by item id, scaled to mean square 1. Raises
    DataError."""
    try:
        vectors = np.load(path, allow_pickle=False)
    except Exception as error:          # numpy fails in many ways on what is no such file
        raise DataError(f"{path} is not a .npy file of numbers, as numpy.save writes ({error})") from None
    shape = getattr(vectors, "shape", ())
    if len(shape) != 2 or shape[0] != n_items or shape[1] == 0 or vectors.dtype.kind not in "fiu":
        raise DataError(f"{path} holds an array of shape {shape}; needed are numbers, one row for each of "
                        f"the {n_items} items")
    if not np.isfinite(vectors).all():
        raise DataError(f"{path}: row {np.argmin(np.isfinite(vectors).all(1))} is not finite")
    vectors = vectors.astype(np.float64) / max(np.abs(vectors).max(), 1e-300)
    return torch.from_numpy(vectors / max(np.sqrt(np.square(vectors).mean()), 1e-12)).float()


def format_codes(codes):
    """Codes (N, L) as LETTER's NAME.index.json: {"0": ["<a_183>", "<b_70>", ...], ...}."""
    return json.dumps({str(item): [f"<{chr(97 + level)}_{code}>" for level, code in enumerate(path)]
                       for item, path in enumerate(codes.tolist())})


def read_codes(path, n_items):
    """Codes (N, L) from a file in LETTER's format. Raises DataError: malformed, or for other items."""
    content = read_json(path)
    rows = []
    for item in map(str, range(n_items)):
        if item not in content:
            raise DataError(f'{path}: item "{item}" has no codes; this dataset has the items "0" to '
                            f'"{n_items - 1}"')
        row = []
        for level, token in enumerate(content[item]):
            match = re.fullmatch(rf"<{chr(97 + level)}_([0-9]{{1,5}})>", str(token))
            row.append(int(match[1]) if match else None)
        if None in row or not row or len(row) != len(content["0"]):
            raise DataError(f'{path}: item "{item}" has the codes {shown(content[item])}; each item needs '
                            'codes as "<a_183>", "<b_7>", as many as the first')
        rows.append(row)
    if len(content) > n_items:
        raise DataError(f"{path} has codes for {len(content)} items, this dataset {n_items} items: give "
                        "the file that belongs to it")
    return torch.tensor(rows)


def semantic_levels(codes):
    """How many leading levels of codes (N, L) carry meaning: all, or all but a last one that only tells
    twins apart, however it is numbered: one that has no more codes than the largest group of twins."""
    _, twins = torch.unique(codes[:, :-1], dim=0, return_counts=True)
    distinct = len(codes.unique(dim=0)) == len(codes)
    counter = distinct and len(codes[:, -1].unique()) <= twins.max()
    return codes.shape[1] - 1 if counter and codes.shape[1] > 1 else codes.shape[1]


def code_figures(codes, size=None):
    """What codes (N, L) are like, as a line: how many of a level's `size` codes are used, or, of a file,
    how many a level has; and the collision rate, 1 - distinct rows / N."""
    used = [len(column.unique()) for column in codes.T]
    rate = 1 - len(codes.unique(dim=0)) / len(codes)
    usage = ", ".join(f"{n / size:.0%}" if size else f"{n}" for n in used)
    text = f"{'codes':12}{'usage' if size else 'a level has'} {usage}; collision rate {rate:.3f}"
    if rate > 0.5:
        text += ("\nnote: most items share their codes with another one, which only the last code tells "
                 "apart;\n      the items' texts or vectors may be too much alike: see --item-vectors")
    return text


# ------------------------------------------------------------------------------------------- metrics

def top(scores, k):
    """The k best items by scores (B, N), best first: ids (B, k), filled up with N where N < k."""
    n_items = scores.shape[1]
    best = scores.topk(min(k, n_items)).indices
    return F.pad(best, (0, k - best.shape[1]), value=n_items)


def ranking_metrics(recommended, target):
    """R@k, the share of users whose next item is among the first k, and N@k, the mean of
    1 / log2(1 + rank). recommended (U, W) ids, best first; target (U,)."""
    hit = (recommended == target[:, None]).double().cpu()
    gain = hit / torch.log2(torch.arange(hit.shape[1]).double() + 2)
    recall = {f"R@{k}": hit[:, :k].sum(1).mean().item() for k in (1, 5, 10, 20)}
    ndcg = {f"N@{k}": gain[:, :k].sum(1).mean().item() for k in (5, 10, 20)}
    return {**recall, **ndcg}


def popularity(data):
    """How often each item stands in the training sequences: (N,)."""
    held_out = torch.cat([data.offsets[1:] - 1, data.offsets[1:] - 2])
    count = torch.bincount(data.items, minlength=data.n_items)
    return count - torch.bincount(data.items[held_out], minlength=data.n_items)


def popular(data):
    """The table's first row: the most popular items, to every user."""
    items = top(popularity(data)[None], 20).expand(data.n_users, -1)
    result = {"test": ranking_metrics(items, data.items[data.offsets[1:] - 1]), "top": items}
    if data.liked is not None:
        result["test"]["liked"] = liked_unseen(items, data)
    return result


def liked_unseen(recommended, data):
    """How many items of a top 10 a user truly likes and never clicked, on average (the toy world alone).
    recommended (U, W), N where there is none."""
    wanted = F.pad(data.liked, (0, 1))
    user = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())
    wanted[user, data.items] = False
    return wanted.gather(1, recommended[:, :10].long()).sum(1).double().mean().item()


def diversity(recommended, data):
    """How varied the top 10 of all users are (Section 4.5), recommended (U, 10). coverage: the share of
    the catalogue that anybody is recommended; KL, in nats, and std: of how often items are recommended,
    against equally often; rank: the mean popularity rank, 1 the most popular."""
    count = torch.bincount(recommended.flatten(), minlength=data.n_items + 1)[:data.n_items]
    share = count.double() / count.sum()
    rank = 1 + popularity(data).argsort(descending=True, stable=True).argsort()
    return {"coverage": (count > 0).double().mean().item(),
            "KL": torch.special.xlogy(share, share * data.n_items).sum().item(),
            "std": (share * data.n_items).std(correction=0).item(),
            "rank": (share * rank).sum().item()}


# -------------------------------------------------------------------------------------------- tables

def aligned(rows):
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(row, widths))) for row in rows)


def paired_difference(found, label, other):
    """Test R@10 of one row less that of another, and its standard error: the users are the same, so it is
    smaller than that of each. Where there are several seeds, a user's mean over them counts."""
    differences = []
    for results, target in found:
        one, two = ((results[name]["top"][:, :10] == target[:, None]).any(1).double()
                    for name in (label, other))
        differences.append(one - two)
    difference = torch.stack(differences).mean(0)                                   # (U,)
    return difference.mean().item(), difference.std().item() / math.sqrt(len(difference))


def results_table(found):
    """The test metrics of each row, its R@10 less SFT's with the paired standard error, and in words what
    that says. found: of each seed {label: result} and the users' test items (U,)."""
    results, _ = found[0]
    columns = ["R@5", "R@10", "N@5", "N@10"] + ["liked"] * ("liked" in results["SFT"]["test"])
    several = len(found) > 1
    rows = [[f"test, {len(found)} seeds" if several else "test", *columns, "valid N@10",
             "R@10 - SFT ± paired SE", "seconds"]]
    lines = []
    for label in results:
        values = []
        for of_seed, _ in found:
            result = of_seed[label]
            values.append([result["test"][name] for name in columns]
                          + [result.get("valid", {}).get("N@10", np.nan), result.get("seconds", np.nan)])
        *mean, seconds = np.mean(values, 0)
        difference = ""
        if label not in ("popular", "SFT"):
            difference = "{:+.4f} ± {:.4f}".format(*paired_difference(found, label, "SFT"))
        rows.append([label, *map(number, mean), difference, number(seconds, ",.0f")])
        if several:
            *spread, _ = np.std(values, 0, ddof=1)
            rows.append(["  ± std", *map(number, spread), "", ""])

    for label in list(results)[3:]:
        says = []
        for other in ("SFT", "then sft", "only sft"):
            if other in results and other != label:
                mean, error = paired_difference(found, label, other)
                word = "level with" if abs(mean) <= 2 * error else "above" if mean > 0 else "below"
                says.append(f"{word} {other} ({mean:+.4f} ± {error:.4f})")
        lines.append(f"{label} is {' and '.join(says)} in R@10")
    return aligned(rows) + "\n\n" + "\n".join(lines)


def report(path, result):
    """Add a line to results.jsonl: what a training reached, by which settings."""
    if "test" in result:
        line = {name: result[name] for name in ("label", "test", "valid", "seconds", "config")}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")


def balance(before, now):
    """How far log Z + log p - log R is off before and after a training, and Z, as a line."""
    off = []
    for seen in (before, now):
        residual = seen["log Z"][:, None] + seen["log p"] - seen["R"].log()
        off.append(residual.square().mean().sqrt())
    return (f"{'':12}log Z + log p - log R is off by {off[0]:.2f} after SFT, by {off[1]:.2f} now; log Z "
            f"{now['log Z'].mean():.2f}, exact {now['exact log Z'].mean():.2f}")


def figures(data):
    """How large a dataset is, as a line."""
    lengths = data.offsets.diff()
    return (f"{data.name}: {data.n_users:,} users, {data.n_items:,} items, {len(data.items):,} "
            f"interactions, {int((lengths - 3).sum()):,} training pairs")


def number(value, form=".4f"):
    """A number as a cell of a table; nothing where there is none."""
    return "" if np.isnan(value) else format(value, form)


def case_study(data, user, results, before, after):
    """Eq. 7 in numbers for a user, then the lists of SFT and of the last result (Fig. 4). before, after:
    what the loss was made of, (1, P) each."""
    titles = [title[:42] or f"item {i}" for i, title in enumerate(data.titles)] + ["-"]
    sequence = data.items[data.offsets[user]:data.offsets[user + 1]].tolist()
    clicked = sequence[-1]
    lines = [f"\nuser {user} clicked", *(f"   {titles[item]}" for item in sequence[-6:-1]),
             f"=> {titles[clicked]}", ""]
    rows = [["Eq. 7, for the click and K others", "r_aug", "r_cs", "r_sim", "R", "w", "log p before",
             "after"]]
    for i, item in enumerate(after["items"][0].tolist()):
        numbers = [after[name][0, i] for name in ("r_aug", "r_cs", "r_sim", "R", "w")]
        numbers += [before["log p"][0, i], after["log p"][0, i]]
        rows.append([titles[item], *(f"{x:.2f}" for x in numbers)])
    lines += [aligned(rows), f"log Z {after['log Z'].item():.2f} learned, "
              f"{after['exact log Z'].item():.2f} exact", ""]
    last = list(results)[-1]
    first, second = (results[label]["top"][user, :10].tolist() for label in ("SFT", last))
    lines.append(f"   {'SFT':<44}   {last}    (* in this list alone)")
    for left, right in zip(first, second):
        mark = "=>" if right == clicked else "  " if right in first else "* "
        lines.append(f"{'=>' if left == clicked else '  '} {titles[left]:<44}{mark} {titles[right]}")
    return "\n".join(lines)


def diversity_table(results, data):
    """`diversity` of each row's test lists."""
    figures = {label: diversity(result["top"][:, :10].long(), data) for label, result in results.items()}
    head = ["top 10", *figures["SFT"]]
    return aligned([head] + [[label, *(f"{x:.4g}" for x in row.values())]
                             for label, row in figures.items()])


def main(argv=None):
    """Check a dataset and print its figures; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    data_dir = "data"
    if "--data-dir" in arguments[:-1]:
        data_dir = arguments[arguments.index("--data-dir") + 1]
    try:
        data = load(arguments[0], Path(data_dir))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(figures(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

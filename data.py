"""What goes into GFlowGR, and how what comes out is judged: a file that knows no model.

    python data.py beauty              download and check a dataset, print its figures
    python data.py path/to/Name        a folder: Name.inter.json, Name.item.json
    python data.py path/to/clicks.csv  a table of your own: user, item, timestamp

LETTER publishes the datasets of the paper in two files each; item ids are 0 .. N - 1:

    NAME.inter.json   {"0": [0, 1, 2], ...}             user -> item ids, oldest first
    NAME.item.json    {"0": {"title": "...", "description": "..."}}    item id -> text

In order: files, download, read, the toy world, split and batches; item vectors, codes;
metrics, tables. Shapes: U users, N items, E examples, B histories in a batch, T items
in a history, L codes of an item.
"""
import argparse
import ast
import collections
import csv
import hashlib
import http.client
import io
import json
import math
import os
import re
import sys
import time
import unicodedata
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

URL = ("https://raw.githubusercontent.com/HonghuiBao2000/LETTER/"
       "8d0154e28de37dbb6e24871c508ad8ddb1921cda/data")

# --dataset -> the git blob id of each file, which its content must have
DATASETS = {
    "beauty": {"inter": "9378c6e88224ebd22e57325d89edb8cfb73291ac",
               "item": "098205baf4a483b818507dc98c4b9bc9151a69f0",
               "index": "6711ba430c7a6889e60f908554f72aae8a038039"},
    "yelp": {"inter": "c80dd3c4131613d694e6be909f0485fcec3b87e3",
             "item": "5e19bf60af056342e80a564cd6a8859a4faa236e",
             "index": "6198e401fc8733f8cf26051a8a5133f3fee0b3ed"},
    "instruments": {"inter": "89733901ab247616059e03c620bf3edff59bc549",
                    "item": "e1b565483dc55f63dc260aab13d0b3e1d73420fd"},
}


class DataError(Exception):
    """Something is wrong with the input; a sentence says what, where, and what to
    do."""


class Data(NamedTuple):
    """A loaded dataset. Item ids are 0 .. N - 1; the id N pads short histories. Users
    are numbered in the order of their names, without those who are left out."""
    name: str
    titles: list                    # (N,) for people
    texts: list                     # (N,) title and description, for item vectors
    items: torch.Tensor             # all users' sequences one after the other
    offsets: torch.Tensor           # (U + 1,) u's: items[offsets[u]:offsets[u + 1]]
    ids: list                       # (N,) what a table calls the items, or their numbers
    liked: torch.Tensor | None      # (U, N) true tastes; only the toy world knows
    fingerprint: str                # a hash of texts, ids and sequences
    parts: dict = {}                # as `split` says

    @property
    def n_items(self):
        return len(self.texts)

    @property
    def n_users(self):
        return len(self.offsets) - 1

    @property
    def user(self):
        """Whose each of `items` is: (interactions,)."""
        return torch.repeat_interleave(torch.arange(self.n_users), self.offsets.diff())


# -------------------------------------------------------------------------------- files

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
    """What `save_tensors` wrote, {} where nothing was; none of it runs as code. Raises
    DataError."""
    if not path.exists():
        return {}
    content = io.BytesIO(path.read_bytes())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception:       # a damaged file fails in many ways, which mean the same
        raise DataError(f"{path} is damaged; remove it and run the same command")


def write_lines(path, entries):
    """Write a .jsonl file of these lines."""
    lines = [json.dumps(entry) + "\n" for entry in entries]
    write_atomically(path, "".join(lines).encode())


def fingerprint(value):
    """A hash of settings and tensors, however nested: 10 hex digits."""
    def of_tensor(x):
        return hashlib.sha1(x.numpy(force=True).tobytes()).hexdigest()

    text = json.dumps(value, sort_keys=True, default=of_tensor)
    return hashlib.sha1(text.encode()).hexdigest()[:10]


def code_hash(*paths):
    """A hash of what Python files do, comments and docstrings apart."""
    trees = [ast.parse(Path(path).read_bytes()) for path in paths]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = ""
    return fingerprint([ast.dump(tree) for tree in trees])


# ----------------------------------------------------------------------------- download

def fetch(url, pauses=(0, 1, 4), timeout=30.0):
    """The body behind a URL, if one of several tries brings it, each after a pause of
    so many seconds. Raises DataError."""
    for pause in pauses:
        time.sleep(pause)
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return response.read()
        except (OSError, http.client.HTTPException) as error:
            reason = error
    raise DataError(f"could not fetch {url} ({reason}); put it by hand into the "
                    "dataset's folder in --data-dir, as data/Beauty/, or use --dataset "
                    "toy, which needs no network")


def download(dataset, data_dir, kinds=("inter", "item"), base_url=URL):
    """Bring the files of a built-in dataset into data_dir/NAME -> that folder. A file
    that lies there is used as it is; what is downloaded must have the content of its
    git blob id. Raises DataError."""
    name = dataset.capitalize()
    folder = Path(data_dir) / name
    for kind in kinds:
        path = folder / f"{name}.{kind}.json"
        if path.exists():
            continue
        url = f"{base_url}/{name}/{path.name}"
        print(f"downloading {url}", flush=True)
        content = fetch(url)
        if git_blob_id(content) != DATASETS[dataset][kind]:
            raise DataError(f"{url} is not the file that it should be, and nothing was "
                            f"kept: try again, or put it at {path} by hand")
        write_atomically(path, content)
    return folder


def ready_codes(codes, dataset, data_dir, n_items):
    """The codes (N, L) that --codes names, of a file or, with `letter`, those that
    LETTER published; None where it names nothing. Raises DataError."""
    if not codes:
        return None
    path = Path(codes)
    if codes == "letter":
        if "index" not in DATASETS.get(dataset, {}):
            raise DataError(f"--codes letter is for beauty and yelp, not {dataset}; "
                            "give the path of a NAME.index.json, or leave --codes out")
        folder = download(dataset, data_dir, ("index",))
        path = folder / f"{folder.name}.index.json"
    ready = read_codes(path, n_items)
    print(code_figures(ready[:, :semantic_levels(ready)]))
    return ready


# --------------------------------------------------------------------------------- read

def load(dataset, data_dir="data", seed=42, max_history=20, device="cpu"):
    """Load `toy`, drawn by a seed, a built-in dataset (downloaded if missing), or a
    folder or table of your own (./toy, if it is called so) -> Data with its parts,
    whose items lie on a device. Raises DataError."""
    path = Path(dataset)
    if dataset in DATASETS:
        path = download(dataset, data_dir)
    if dataset == "toy":
        data = toy(seed)
    elif path.is_dir():
        data = read_folder(path)
    elif path.is_file() and path.suffix in (".csv", ".tsv", ".inter"):
        data = read_interactions(path)
    else:
        raise DataError(f"unknown dataset {dataset!r}: choose toy, {', '.join(DATASETS)}, "
                        "or the path of a folder Name that has Name.inter.json and "
                        "Name.item.json, or of a table .csv, .tsv or .inter")
    return data._replace(parts=split(data, max_history, device))


def bundle(name, titles, texts, sequences, ids=None, liked=None):
    """Sequences of item ids, one for each user -> Data. Users of fewer than 3 items
    are left out, which a line tells. Raises DataError where nothing is left to train
    on."""
    kept = [sequence for sequence in sequences if len(sequence) >= 3]
    if len(kept) < len(sequences):
        print(f"{name}: {len(sequences) - len(kept)} of {len(sequences)} users have "
              "fewer than 3 interactions and are left out")
    lengths = torch.tensor([0, *map(len, kept)])
    if lengths.max() < 4:
        raise DataError(f"{name}: no user has the 4 interactions that training needs")

    items = torch.tensor([item for sequence in kept for item in sequence])
    offsets = lengths.cumsum(0)
    key = git_blob_id(json.dumps([texts, ids]).encode() + items.numpy().tobytes()
                      + offsets.numpy().tobytes())
    ids = ids or list(range(len(texts)))
    return Data(name, titles, texts, items, offsets, ids, liked, key)


def shown(value):
    """A value as a message shows it: at most 80 characters of one line."""
    return json.dumps(value, ensure_ascii=False)[:80]


def read_json(path):
    """A JSON object of at least one entry from a file. Raises DataError."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a readable JSON file ({error}); put a "
                        "whole one there")
    if not isinstance(content, dict) or not content:
        raise DataError(f'{path} must hold an object of one entry or more: {{"0": ..}}')
    return content


def read_folder(folder):
    """Read and check NAME/NAME.inter.json and NAME/NAME.item.json -> Data. Raises
    DataError."""
    name = Path(os.path.abspath(folder)).name

    # The items: those of N entries have the ids 0 .. N - 1.
    path = folder / f"{name}.item.json"
    entries = read_json(path)
    titles = []
    texts = []
    for item in map(str, range(len(entries))):
        if item not in entries:
            raise DataError(f'{path}: item "{item}" has no entry; {len(entries)} items '
                            f'have the ids "0" to "{len(entries) - 1}"')
        try:
            title = entries[item].get("title") or ""
            text = entries[item].get("description") or ""
            titles.append(title.strip() or f"item {item}")
            texts.append((title + " " + text).strip())
        except (AttributeError, TypeError):
            raise DataError(f'{path}: item "{item}" must be {{"title": text, '
                            f'"description": text}}, not {shown(entries[item])}')

    # The users, in an order that does not depend on that of the file.
    path = folder / f"{name}.inter.json"
    users = read_json(path)
    for user, sequence in users.items():
        if not isinstance(sequence, list):
            raise DataError(f'{path}: user "{user}" must have a list of item ids, not '
                            f"{shown(sequence)}")
        for item in sequence:
            if type(item) is not int:
                raise DataError(f'{path}: user "{user}" has the item {shown(item)}, a '
                                f"{type(item).__name__}; an item id is a whole number")
            if not 0 <= item < len(texts):
                raise DataError(f'{path}: user "{user}" has the item {item}, which is '
                                f"not in the catalogue (ids 0 to {len(texts) - 1})")
    order = sorted(users, key=lambda user: (len(user), user))
    return bundle(name, titles, texts, [users[user] for user in order])


def read_table(path, names):
    """Rows of a .csv, .tsv or .inter, one by one: the line's number and the cells of
    the columns `names`. A header names them (user, user_id, user_id:token ..), the
    first two at least; interactions may do without: then they stand in this order,
    without others. What is missing is "". Raises DataError."""
    content = path.read_bytes()
    try:
        text = content.decode(json.detect_encoding(content))        # UTF-8, UTF-16 ..
        reader = csv.reader(io.StringIO(text, newline=""),
                            delimiter="," if path.suffix == ".csv" else "\t",
                            strict=True)        # or a lone quote would swallow lines
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path} is not a table ({error}); save it as UTF-8, "
                        "its quotes in pairs")
    if not rows:
        raise DataError(f"{path} is empty")

    # Does the first row name the columns, or is it a row as any other?
    _, first = rows[0]
    head = [cell.split(":")[0].strip().lower().removesuffix("_id") for cell in first]
    if set(names[:2]) <= set(head):
        rows = rows[1:]
    elif len(head) > len(names) or set(names) & set(head) or "title" in names:
        raise DataError(f"{path} needs a first line that names its columns, among them "
                        f"{' and '.join(names[:2])}; it has {shown(first)}")
    else:
        head = names

    for line, row in rows:
        if "".join(row[len(head):]).strip():
            raise DataError(f"{path} has more cells than columns in line {line}; quote "
                            "those that hold a comma")
        cells = dict(zip(head, row))
        yield line, *(cells.get(name, "").strip() for name in names)


def read_interactions(path):
    """Read a table of user, item, timestamp, and NAME.items.csv (item, title,
    description) where it lies beside it, also of items that nobody clicked -> Data; a
    user's items are sorted by time, equal times as in the file. Raises DataError."""
    clicks = []
    for line, user, item, when in read_table(path, ("user", "item", "timestamp")):
        try:
            moment = float(when)
        except ValueError:
            moment = math.nan
        if not (user and item and math.isfinite(moment)):
            raise DataError(f"{path}, line {line}: needed are a user, an item and a "
                            f"number as timestamp, not {shown([user, item, when])}; "
                            "columns are user, item, timestamp, or as a header says, "
                            "with commas between them in a .csv, else tabs")
        clicks.append((moment, user, item))
    clicks.sort(key=lambda click: click[0])         # rows of one time stay in order

    # The catalogue: what was clicked, and what else has a text.
    texts = {item: ["", ""] for _, _, item in clicks}
    beside = path.with_suffix(".items.csv")
    if beside.exists():
        rows = read_table(beside, ("item", "title", "description"))
        told = {item: text for _, item, *text in rows if item}
        if not told.keys() & texts.keys():
            raise DataError(f"{path} has no item of {beside}: are its ids the same, its "
                            f"cells apart by commas? It has {shown([*told][:3])}")
        texts.update(told)

    # Users and items are in the order of their ids, whatever that of the rows; items'
    # shorter ones first, so that 2 comes before 10.
    ids = sorted(texts, key=lambda item: (len(item), item))
    number = {item: i for i, item in enumerate(ids)}
    sequences = {}
    for _, user, item in clicks:
        sequences.setdefault(user, []).append(number[item])
    return bundle(path.stem, [texts[item][0] or item for item in ids],
                  [" ".join(texts[item]).strip() for item in ids],
                  [sequences[user] for user in sorted(sequences)], ids)


def toy(seed=42, n_users=2000, n_items=600, n_categories=15, n_brands=20):
    """A small world whose users' true tastes are known -> Data. Each user has
    favourite categories and brands, each item an appeal of its own. `liked`: a user's
    5 % most preferred items."""
    rng = np.random.default_rng(seed)

    # What there is, and how much each user would like it: 2 categories and 3 brands.
    category = rng.integers(n_categories, size=n_items)
    brand = rng.integers(n_brands, size=n_items)
    taste_category = 3.0 * (rng.random((n_users, n_categories)).argsort(1) < 2)
    taste_brand = 2.0 * (rng.random((n_users, n_brands)).argsort(1) < 3)
    preference = taste_category[:, category] + taste_brand[:, brand]            # (U, N)
    preference += rng.normal(0, 0.7, n_items)
    liked = preference >= np.quantile(preference, 0.95, axis=1, keepdims=True)

    # Sequences of 5 to 20 items are drawn from the softmax of that, with a
    # pull to the category before: the argmax of logits + Gumbel noise is a draw.
    lengths = np.minimum(rng.geometric(0.25, n_users) + 4, 20)
    before = np.full(n_users, -1)
    chosen = []
    for _ in range(lengths.max()):
        pull = 1.5 * (category == before[:, None])
        noise = rng.gumbel(size=preference.shape)
        item = (preference + pull + noise).argmax(1)                        # (U,)
        preference[np.arange(n_users), item] = -np.inf      # none twice
        before = category[item]
        chosen.append(item)
    sequences = [row[:n].tolist() for row, n in zip(np.stack(chosen, 1), lengths)]

    # Texts tell the category and the brand, amid some noise.
    titles = []
    texts = []
    for i, (c, b) in enumerate(zip(category, brand)):
        titles.append(f"brand{b} product{i} of category{c}")
        texts.append(f"{titles[i]} kind{c} style{c} maker{b} tone{rng.integers(40)}")
    return bundle("toy", titles, texts, sequences, liked=torch.from_numpy(liked))


def check_size(data, max_history, k, pool=512):
    """Raises DataError where there are fewer items than a list has, or where a pool may
    hold fewer than k items that a user has not clicked."""
    if data.n_items < 20:
        raise DataError(f"{data.name} has {data.n_items} items; at least 20 are needed")
    pool = min(pool, data.n_items)
    longest = min(max_history, int(data.offsets.diff().max()))
    if pool - longest - 1 < k:
        raise DataError(f"a pool of {pool} items may hold fewer than {k} that a user "
                        "has not clicked; lower --k, or --max-history")


# -------------------------------------------------------------------- split and batches

class Examples(NamedTuple):
    """E histories, items[start[e]:end[e]], and what follows them: the item after each
    of them, or, where `every` says so, the item after each item. The items lie on the
    device of the model."""
    items: torch.Tensor     # (interactions + 1,) the last is the padding, N
    start: torch.Tensor     # (E,)
    end: torch.Tensor       # (E,)
    every: bool = False

    @property
    def length(self):
        return self.end - self.start

    @property
    def on_cpu(self):
        return self.items.device.type == "cpu"

    def batch(self, rows):
        """Histories (B, T), padded on the right, and targets (B,), or (B, T) where every
        item has one. T is the longest history of this batch, or, on a GPU, whose graph
        wants one shape, of all examples. rows (B,), on the CPU."""
        start = self.start[rows][:, None]
        end = self.end[rows][:, None]
        lengths = self.length[rows] if self.on_cpu else self.length
        position = start + torch.arange(int(lengths.max()))                 # (B, T)
        padding = len(self.items) - 1
        history = torch.where(position < end, position, padding)
        following = end[:, 0]
        if self.every:
            following = torch.where(position < end, position + 1, padding)
        device = self.items.device
        return self.items[history.to(device)], self.items[following.to(device)]


def split(data, max_history=20, device="cpu"):
    """Leave-one-out: of a user's items 0 .. n, n is the test target, n - 1 the
    validation target, 1 .. n - 2 are training targets; the history of each is the last
    `max_history` items before it. -> {"train", "valid", "test", "windows": Examples};
    those of "valid" and "test" are in the order of the users. "windows" are the
    training targets once more, each once, in as few rows: a user's training sequence,
    cut from its end on into windows of `max_history` items."""
    first = data.offsets[data.user]                 # (interactions,) of the same user
    position = torch.arange(len(data.items))
    after = data.offsets[data.user + 1] - 1 - position      # how many items follow
    train = (position > first) & (after > 1)
    ends = {"train": position[train],
            "valid": position[after == 1],
            "test": position[after == 0],
            "windows": position[train & ((after - 2) % max_history == 0)]}

    items = F.pad(data.items, (0, 1), value=data.n_items).to(device)
    return {part: Examples(items, torch.maximum(first[end], end - max_history), end,
                           every=part == "windows")
            for part, end in ends.items()}


def batches(examples, batch, seed):
    """Rows of batches, without end: each row once a pass, always `batch` of them (at
    most as many as there are examples); what is left over opens the next pass. On a
    CPU histories of like length come together, so that little is padded."""
    lengths = examples.length
    generator = torch.Generator().manual_seed(seed)
    left = torch.arange(0)
    while True:
        rows = torch.cat([left, torch.randperm(len(lengths), generator=generator)])
        full = len(rows) // batch * batch               # as many as fill whole batches
        left = rows[full:]
        rows = rows[:full]
        if examples.on_cpu:
            rows = rows[torch.argsort(lengths[rows], stable=True)]
        chunks = rows.split(batch)
        for i in torch.randperm(len(chunks), generator=generator).tolist():
            yield chunks[i]


# --------------------------------------------------------------- item vectors and codes

# Marks (accents, vowel signs) belong to the letter before them. Thai, Lao, Burmese,
# Khmer, kana and Chinese characters put no space between words.
MARKS = "".join(chr(i) for i in range(0x20000)
                if unicodedata.category(chr(i)).startswith("M"))
UNSPACED = ("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u9fff"
            "\uf900-\ufaff\U00020000-\U0003ffff]")


def words(text):
    """The words of a text in any script; of scripts without spaces between words,
    pairs of characters."""
    # One form for what looks the same: full-width letters, accents of two characters.
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(f"{UNSPACED}+", r" \g<0> ", text)
    found = []
    for word in re.findall(rf"\w[\w{MARKS}]*", text):
        size = 2 if re.match(UNSPACED, word) else len(word)
        found += [word[i:i + size] for i in range(max(len(word) - size + 1, 1))]
    return found


def text_vectors(texts, dim=128, seed=42):
    """TF-IDF over words, then a truncated SVD: (N, dim), mean square 1. Items whose
    words tell nothing of likeness get zeros, and a line says how many."""
    counts = [collections.Counter(words(text)) for text in texts]
    frequency = collections.Counter(word for count in counts for word in count)

    # The matrix, by its entries that are not 0: (item, word, weight).
    column = {}
    entries = []
    empty = 0
    for row, count in enumerate(counts):
        # A word of one item alone says nothing of likeness; one of all items has weight
        # 0. The rest is scaled to length 1.
        weight = {word: (1 + math.log(n)) * math.log(len(texts) / frequency[word])
                  for word, n in count.items() if frequency[word] > 1}
        norm = math.hypot(*weight.values())
        if norm == 0:
            empty += 1
            continue
        for word in weight:
            place = column.setdefault(word, len(column))
            entries.append((row, place, weight[word] / norm))
    if empty:
        print(f"note: {empty:,} of {len(texts):,} items have no word that some others "
              "have, so their vectors are zero; --item-vectors helps")

    if not entries:
        return torch.zeros(len(texts), dim)
    *places, values = zip(*entries)
    matrix = torch.sparse_coo_tensor(places, values, (len(texts), len(column)),
                                     dtype=torch.float32, check_invariants=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)                     # svd_lowrank draws its probes
        left, scale, _ = torch.svd_lowrank(
            matrix.coalesce(), min(dim + 16, *matrix.shape), niter=4)
    return components(left, scale, dim)


def item_vectors(data, own, collaborative):
    """Item vectors (N, d): your own, or of the texts, or, without any text, SASRec's
    (N, dim)."""
    if own is not None:
        return own
    if any(data.texts):
        return text_vectors(data.texts)
    print("the items have no texts: their vectors are SASRec's own")
    return principal_vectors(collaborative, collaborative.shape[1])


def principal_vectors(x, dim):
    """The first principal components of rows (N, d) -> (N, dim), mean square 1, zeros
    where dim > d."""
    left, scale, _ = torch.linalg.svd((x - x.mean(0)).float(), full_matrices=False)
    return components(left, scale, dim)


def components(left, scale, dim):
    """The first components of an SVD, left (N, q), scale (q,) -> (N, dim), mean square
    1, zeros where dim > q."""
    x = F.pad(left * scale, (0, dim - len(scale)))          # cut, or filled up
    return x / x.square().mean().sqrt().clamp(min=1e-12)


def read_vectors(path, n_items):
    """Item vectors of your own (N, d) from a .npy file, rows in the order of `Data.ids`,
    scaled to mean square 1; None where no file is named. Raises DataError."""
    if not path:
        return None
    try:
        vectors = np.asarray(np.load(path, allow_pickle=False), np.float64)
    except Exception as error:      # numpy fails in many ways on what is no such file
        raise DataError(f"{path} is not a .npy file of numbers, as numpy.save writes "
                        f"({error})")
    if vectors.ndim != 2 or len(vectors) != n_items or not vectors.size:
        raise DataError(f"{path} holds an array of shape {vectors.shape}; needed are "
                        f"numbers, one row for each of the {n_items} items, by id")
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        raise DataError(f"{path}: row {finite.argmin()} is not finite")

    vectors /= max(np.abs(vectors).max(), 1e-300)       # so that no square overflows
    size = np.sqrt(np.square(vectors).mean())
    return torch.from_numpy(vectors / max(size, 1e-12)).float()


def read_codes(path, n_items):
    """Codes (N, L) from a file in LETTER's format, {"0": ["<a_183>", "<b_70>"], ..}.
    Raises DataError: malformed, or for other items."""
    content = read_json(path)
    rows = []
    for item in map(str, range(n_items)):               # in whatever order the file is
        if item not in content:
            raise DataError(f'{path}: item "{item}" has no codes; this dataset has the '
                            f'items "0" to "{n_items - 1}"')
        row = list(map(int, re.findall("_([0-9]{1,9})>", json.dumps(content[item]))))
        expected = [f"<{chr(97 + level)}_{code}>" for level, code in enumerate(row)]
        rows.append(row)
        if not row or content[item] != expected or len(row) != len(rows[0]):
            raise DataError(f'{path}: item "{item}" has the codes '
                            f'{shown(content[item])}; each item needs codes as '
                            '"<a_183>", "<b_7>", as many as the first')
    if len(content) > n_items:
        raise DataError(f"{path} has codes for {len(content)} items, this dataset "
                        f"{n_items} items: give the file that belongs to it")
    return torch.tensor(rows)


def unique_paths(codes):
    """Append a code that counts the items of equal codes, where there are such: (N, L)
    -> (N, L + 1) (TIGER). Items with the codes (3, 1), (3, 1), (0, 2) get (3, 1, 0),
    (3, 1, 1), (0, 2, 0)."""
    twins = collections.Counter()
    count = []
    for row in map(tuple, codes.tolist()):
        count.append(twins[row])
        twins[row] += 1
    if any(count):
        codes = torch.cat([codes, torch.tensor(count)[:, None]], 1)
    return codes


def semantic_levels(codes):
    """How many leading levels of codes (N, L) carry meaning. By our guess all but the
    last, if that one only tells twins apart: without it some rows are the same, and it
    has no more codes than the largest group of them. Else all."""
    levels = codes.shape[1]
    if levels > 1 and len(codes.unique(dim=0)) == len(codes):
        _, twins = torch.unique(codes[:, :-1], dim=0, return_counts=True)
        if len(codes[:, -1].unique()) <= twins.max():
            levels -= 1
    return levels


def code_figures(codes, size=None):
    """What codes (N, L) are like, in words: how many of a level's `size` codes are used,
    or, of a file, how many a level has; and the collision rate, 1 - distinct rows /
    N, with a note where it is high."""
    used = [len(column.unique()) for column in codes.T]
    usage = f"a level has {', '.join(map(str, used))}"
    if size:
        usage = f"usage {', '.join(f'{n / size:.0%}' for n in used)}"
    rate = 1 - len(codes.unique(dim=0)) / len(codes)
    text = f"{'codes':12}{usage}; collision rate {rate:.3f}"
    if rate > 0.7:
        text += ("\nnote: most items share their codes with another one, which only "
                 "the last code tells apart;\n      the items' texts or vectors may be "
                 "too much alike: see --item-vectors")
    return text


# ------------------------------------------------------------------------------ metrics

def ranking_metrics(recommended, target):
    """R@k, the share of users whose next item is among the first k, and N@k, the mean
    of 1 / log2(1 + rank), 0 beyond k. recommended (U, W) ids, best first, W = 20 for
    all; target (U,)."""
    hit = (recommended == target[:, None]).double().cpu()
    gain = hit / torch.log2(torch.arange(hit.shape[1]).double() + 2)
    recall = {f"R@{k}": hit[:, :k].sum(1).mean().item() for k in (1, 5, 10, 20)}
    ndcg = {f"N@{k}": gain[:, :k].sum(1).mean().item() for k in (5, 10, 20)}
    return {**recall, **ndcg}


def tested(top, data):
    """Test lists (U, W) of items, best first -> {"test": their metrics, "top": the
    lists, "hit": whether each user's item is among the first 10 (U,)}."""
    target = data.items[data.offsets[1:] - 1]
    metrics = ranking_metrics(top, target)
    if data.liked is not None:
        metrics["liked"] = liked_unseen(top, data)
    return {"test": metrics, "top": top, "hit": (top[:, :10] == target[:, None]).any(1)}


def popularity(data):
    """How often each item stands in the training sequences: (N,)."""
    training = torch.arange(len(data.items)) < data.offsets[data.user + 1] - 2
    return torch.bincount(data.items[training], minlength=data.n_items)


def liked_unseen(recommended, data):
    """How many items of a top 10 a user truly likes and never clicked, on average (the
    toy world alone). recommended (U, W)."""
    wanted = data.liked.clone()
    wanted[data.user, data.items] = False
    return wanted.gather(1, recommended[:, :10]).sum(1).double().mean().item()


def diversity(recommended, data):
    """How varied the top 10 of all users are (Section 4.5), recommended (U, 10).
    coverage: the share of the catalogue that anybody is recommended; KL, in nats, and
    std: of how often items are recommended, against equally often; rank: the mean
    popularity rank, 1 the most popular."""
    count = torch.bincount(recommended.flatten(), minlength=data.n_items)
    share = count.double() / count.sum()
    rank = 1 + popularity(data).argsort(descending=True, stable=True).argsort()
    relative = share * data.n_items             # 1 for each where all are equally often
    return {"coverage": (count > 0).double().mean().item(),
            "KL": torch.special.xlogy(share, relative).sum().item(),
            "std": relative.std(correction=0).item(),
            "rank": (share * rank).sum().item()}


# ------------------------------------------------------------------------------- tables

def aligned(rows):
    """Rows of cells as lines: the first column to the left, the others to the
    right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    form = "  ".join(f"{{:>{width}}}" for width in widths).replace(">", "<", 1)
    return "\n".join(form.format(*row) for row in rows)


def paired_difference(found, label, other):
    """Test R@10 of one row less that of another, and its standard error over users.
    Both rows have the same users, many of whom they both hit, so it is smaller than
    for two samples. found: of each seed {label: result}, of which a user's mean
    counts."""
    differences = [results[label]["hit"].double() - results[other]["hit"].double()
                   for results in found]
    difference = torch.stack(differences).mean(0)                           # (U,)
    spread = difference.std(correction=min(1, len(difference) - 1))
    error = spread / len(difference) ** 0.5
    return difference.mean().item(), error.item()


def results_table(found):
    """The test metrics of each row, its R@10 less SFT's with the paired standard
    error, and in words what that says. found: of each seed {label: result}."""
    # One column for each metric; the toy world has one more.
    results = found[0]
    columns = [name for name in ("R@5", "R@10", "N@5", "N@10", "liked")
               if name in results["SFT"]["test"]]
    seeds = f", {len(found)} seeds" if len(found) > 1 else ""
    rows = [["test" + seeds, *columns, "valid N@10", "R@10 - SFT ± paired SE",
             "seconds"]]

    # One row for each method: its mean over the seeds, and, of several, their spread.
    for label in results:
        values = []
        for of_seed in found:
            result = of_seed[label]
            test = [result["test"][name] for name in columns]
            values.append([*test, result["valid"]["N@10"], result["seconds"]])
        *mean, seconds = np.mean(values, 0)
        difference = ""
        if label != "SFT":
            difference = "{:+.4f} ± {:.4f}".format(
                *paired_difference(found, label, "SFT"))
        rows.append([label, *(f"{x:.4f}" for x in mean), difference, f"{seconds:,.0f}"])
        if seeds:
            *spread, _ = np.std(values, 0, ddof=1)
            rows.append(["  ± std", *(f"{x:.4f}" for x in spread), "", ""])

    # What does it say? Two standard errors count as a difference.
    lines = []
    for label in list(results)[2:]:
        says = []
        for other in ("SFT", "then sft"):
            if other in results and other != label:
                mean, error = paired_difference(found, label, other)
                word = "level with"
                if abs(mean) > 2 * error:
                    word = "above" if mean > 0 else "below"
                says.append(f"{word} {other} ({mean:+.4f} ± {error:.4f})")
        lines.append(f"{label} is {' and '.join(says)} in R@10")
    return aligned(rows) + "\n\n" + "\n".join(lines)


def report(path, result):
    """Add a line to results.jsonl: what a training reached, by which settings."""
    if "test" in result:
        names = ("label", "test", "valid", "seconds", "config")
        with open(path, "a") as file:
            file.write(json.dumps({name: result[name] for name in names}) + "\n")


def balance(before, now):
    """How far log Z + log p - log R is off before and after a training, and Z, as a
    line."""
    off = []
    for seen in (before, now):
        residual = seen["log Z"][:, None] + seen["log p"] - seen["R"].log()
        off.append(residual.square().mean().sqrt())
    return (f"{'':12}log Z + log p - log R is off by {off[0]:.2f} after SFT, by "
            f"{off[1]:.2f} now; log Z {now['log Z'].mean():.2f}, exact "
            f"{now['exact log Z'].mean():.2f}")


def figures(data):
    """How large a dataset is, as a line."""
    return (f"{data.name}: {data.n_users:,} users, {data.n_items:,} items, "
            f"{len(data.items):,} interactions, "
            f"{len(data.items) - 3 * data.n_users:,} training pairs")


def case_study(data, user, results, before, after):
    """Eq. 7 in numbers for a user, then the lists of SFT and of the last result (Fig.
    4). before, after: what the loss was made of, (1, P) each."""
    titles = [" ".join(title.split())[:42] for title in data.titles]
    *earlier, clicked = data.items[data.offsets[user]:data.offsets[user + 1]].tolist()
    lines = [f"\nuser {user} clicked", *(f"   {titles[item]}" for item in earlier[-5:]),
             f"=> {titles[clicked]}", ""]

    rows = [["Eq. 7, for the click and K others", "r_aug", "r_cs", "r_sim", "R", "w",
             "log p before", "after"]]
    numbers = [after[name][0] for name in ("r_aug", "r_cs", "r_sim", "R", "w")]
    for item, *cells in zip(after["items"][0].tolist(), *numbers,
                            before["log p"][0], after["log p"][0]):
        rows.append([titles[item], *(f"{x:.2f}" for x in cells)])
    lines += [aligned(rows), f"log Z {after['log Z'].item():.2f} learned, "
              f"{after['exact log Z'].item():.2f} exact", ""]

    # The lists side by side: => is what was clicked.
    *_, last = results
    first = results["SFT"]["top"][user, :10].tolist()
    second = results[last]["top"][user, :10].tolist()
    marks = {**dict.fromkeys(first, "  "), clicked: "=>"}
    lines.append(f"   {'SFT':<44}   {last}    (* in this list alone)")
    for one, two in zip(first, second):
        lines.append(f"{marks[one]} {titles[one]:<44}"
                     f"{marks.get(two, '* ')} {titles[two]}")
    return "\n".join(lines)


def diversity_table(results, data):
    """`diversity` of each row's test lists."""
    rows = []
    for label, result in results.items():
        found = diversity(result["top"][:, :10], data)
        rows.append([label, *(f"{x:.4g}" for x in found.values())])
    return aligned([["top 10", *found], *rows])


def main(argv=None):
    """Check a dataset and print its figures, or in a sentence what is wrong with it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", help="toy, beauty, yelp .., a folder, or a table")
    parser.add_argument("--data-dir", default="data")
    arguments = parser.parse_args(argv)
    try:
        print(figures(load(arguments.dataset, arguments.data_dir)))
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")            # of a console without some letters
    main()

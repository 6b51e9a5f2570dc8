"""The proof of data.py and gflowgr.py, in their order: each formula meets something that is
independent of it, such as brute force, a closed form, or golden values of the standard
implementation.

    python -m pytest -q test_gflowgr.py             the proof; -m slow: its long forms
    python test_gflowgr.py --benchmark              pairs/s and users/s, beside Hugging Face's T5;
                                                    --items 100000: of a larger catalogue
"""

import argparse
import dataclasses
import http.server
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close as close
from torch.utils.flop_counter import FlopCounterMode

import data as datasets
import gflowgr as g
from data import DataError

HERE = Path(__file__).parent


N = 300  # items of a world, and so the padding
INTER = '{"0": [0, 1, 2, 1], "1": [2, 1, 0]}'
TURNED = '{"1": [2, 1, 0], "0": [0, 1, 2, 1]}'
MOVED = '{"0": [0, 1, 2], "1": [1, 2, 1, 0]}'
ITEM = """{"2": {"title": " ", "description": null},
           "0": {"title": "thing 0", "description": "of wood"},
           "1": {"title": "thing 1", "price": 5}}"""
STONE = ITEM.replace("wood", "stone")


def numbers(text):
    """Rows of numbers: "1 2, 3" -> [[1, 2], [3]]."""
    return [[int(number) for number in row.split()] for row in text.split(",")]


def cases(text):
    """The rows of a table in text, its cells apart by |."""
    lines = text.strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def write_folder(root, inter=INTER, item=ITEM, name="Own", encoding="utf-8"):
    """A dataset in LETTER's format -> its folder."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / f"{name}.inter.json").write_text(inter, encoding)
    (folder / f"{name}.item.json").write_text(item, encoding)
    return str(folder)


def world(sequences, liked=None):
    """A dataset of these sequences."""
    texts = [f"thing {i}" for i in range(N)]
    return datasets.bundle("world", texts, texts, sequences, liked=liked)


def padded(items, width):
    return items + [N] * (width - len(items))


def refusal(function, *arguments):
    """The one sentence with which something is refused."""
    with pytest.raises(DataError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files_under(folder):
    return [path.name for path in folder.rglob("*") if path.is_file()]


# -------------------------------------------------------------------------------- files


def test_blob_id_is_gits():
    # printf 'hello\n' | git hash-object --stdin
    known = "ce013625030ba8dba906f756967f9e9ca394464a"
    assert datasets.git_blob_id(b"hello\n") == known


@pytest.mark.parametrize("owner, name", [(os, "replace"), (Path, "write_bytes")])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, owner, name):
    def fail(part, *arguments):
        part.touch()
        raise OSError("no space left")

    path = tmp_path / "new" / "x"
    datasets.write_atomically(path, b"old")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError):
        datasets.write_atomically(path, b"new")
    assert files_under(tmp_path) == ["x"]
    assert path.read_bytes() == b"old"


def test_tensors_come_back_and_damaged_or_foreign_files_are_named(tmp_path):
    path = tmp_path / "x.pt"
    assert datasets.load_tensors(path) == {}
    datasets.save_tensors(path, {"deep": [torch.arange(3), 0.5]})
    assert datasets.load_tensors(path)["deep"][0].tolist() == [0, 1, 2]
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path} is damaged; remove it" in refusal(datasets.load_tensors, path)
    torch.save(Path("y"), path)  # an object: to read it would run code
    assert f"{path} is damaged; remove it" in refusal(datasets.load_tensors, path)


def test_code_hash_ignores_comments_and_docstrings_alone(tmp_path):
    hashes = []
    for text in ('"""A."""\nx = 1', '"""B."""\n\n# why\nx = 1', '"""A."""\nx = 2'):
        (tmp_path / "code.py").write_text(text)
        hashes.append(datasets.code_hash(tmp_path / "code.py"))
    assert hashes[0] == hashes[1] != hashes[2]


# ----------------------------------------------------------------------------- download


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the next of `replies`: (status, body, announced length)."""

    def do_GET(self):
        self.server.asked.append(self.path)
        status, body, length = self.server.replies.pop(0)
        self.send_response(status)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


BUSY = (503, b"", 0)
CUT = (200, b"{", 99)
WRONG = (200, b"{}", 2)
GOOD = (200, INTER.encode(), len(INTER))


@pytest.fixture
def get(tmp_path, monkeypatch):
    """get(*replies) downloads the dataset `tiny` from a server that answers so."""
    known = {"inter": datasets.git_blob_id(INTER.encode())}
    monkeypatch.setitem(datasets.DATASETS, "tiny", known)
    monkeypatch.setattr(datasets.time, "sleep", lambda seconds: None)
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()

    def get(*replies):
        server.replies = list(replies)
        server.asked = []
        url = f"http://127.0.0.1:{server.server_port}"
        datasets.download("tiny", tmp_path, ("inter",), url)
        return server.asked

    yield get
    server.shutdown()
    server.server_close()


def test_what_is_downloaded_is_kept_and_not_asked_for_again(get, tmp_path):
    assert get(GOOD) == ["/Tiny/Tiny.inter.json"]
    assert get() == []
    assert (tmp_path / "Tiny" / "Tiny.inter.json").read_text() == INTER


def test_a_busy_server_and_a_cut_connection_are_tried_again(get, tmp_path):
    assert len(get(BUSY, CUT, GOOD)) == 3
    assert files_under(tmp_path) == ["Tiny.inter.json"]


@pytest.mark.parametrize(
    "replies, words",
    [([BUSY] * 3, "503"), ([WRONG], "is not the file that it should be")],
)
def test_a_failed_download_is_named_and_leaves_nothing(get, tmp_path, replies, words):
    message = refusal(get, *replies)
    assert words in message and "/Tiny/Tiny.inter.json" in message
    assert files_under(tmp_path) == []


def test_no_network_names_the_way_out(get, tmp_path):
    nobody = "http://127.0.0.1:9"
    message = refusal(datasets.download, "tiny", tmp_path, ("inter",), nobody)
    assert "--dataset toy, which needs no network" in message


# --------------------------------------------------------------------------------- read


@pytest.mark.parametrize(
    "kind, content, words",
    cases("""
    inter | {"0": [0                      | not a readable JSON file
    inter | []                            | must hold an object
    inter | {}                            | must hold an object
    inter | {"7": [0, 1, 3]}              | user "7" has the item 3, which is not in
    inter | {"7": [0, 1, -1]}             | user "7" has the item -1, which is not in
    inter | {"7": ["2"]}                  | item "2", a str; an item id is a whole
    inter | {"7": [2.0]}                  | item 2.0, a float; an item id is a whole
    inter | {"7": [[2, 9]]}               | item [2, 9], a list; an item id is a whole
    inter | {"7": [true]}                 | item true, a bool; an item id is a whole
    inter | {"7": {"0": 1}}               | user "7" must have a list of item ids
    inter | {"7": [0, 1, 2]}              | no user has the 4 interactions
    item  | {"0": {}, "2": {}}            | item "1" has no entry
    item  | {"0": "text"}                 | item "0" must be {"title": text
    item  | {"0": {"title": 5}}           | item "0" must be {"title": text
    item  | {"0": {"description": ["a"]}} | item "0" must be {"title": text
"""),
)
def test_malformed_files_are_named(tmp_path, kind, content, words):
    message = refusal(datasets.load, write_folder(tmp_path, **{kind: content}))
    assert words in message and "Own" in message


def test_missing_files_and_unknown_names_are_named(tmp_path):
    assert "item.json is not a readable" in refusal(datasets.load, str(tmp_path))
    assert "unknown dataset 'beuty': choose toy" in refusal(datasets.load, "beuty")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_folder_is_read_in_every_unicode_encoding(tmp_path, encoding):
    data = datasets.load(write_folder(tmp_path, encoding=encoding))
    assert data.items.tolist() == [0, 1, 2, 1, 2, 1, 0]
    assert data.offsets.tolist() == [0, 4, 7]
    assert data.texts == ["thing 0 of wood", "thing 1", ""]
    assert data.titles == ["thing 0", "thing 1", "item 2"]


def test_users_of_two_items_are_left_out_and_counted(capsys):
    data = world(numbers("0 1 2 3, 4 5, 6 7 8"))
    assert data.offsets.tolist() == [0, 4, 7]
    assert "1 of 3 users have fewer than 3 interactions" in capsys.readouterr().out


def test_a_fingerprint_is_of_sequences_and_texts_whatever_their_order(tmp_path):
    found = []
    for changed in ({}, {"inter": TURNED}, {"inter": MOVED}, {"item": STONE}):
        folder = write_folder(tmp_path / str(len(found)), **changed)
        found.append(datasets.load(folder).fingerprint)
    assert found[0] == found[1] and len(set(found)) == 3


ROWS = """1,c\u2028c,3
2,"a,a",1
1,"a,a",1
1,"b
b",2
1,"a,a",3
2,"b
b",1
2,c\u2028c,0"""


@pytest.mark.parametrize(
    "suffix, encoding, header",
    cases("""
    .csv   | utf-8     | user,item,timestamp
    .csv   | utf-8-sig | User_ID,"Item",Timestamp
    .csv   | utf-16    |
    .csv   | utf-8     |
    .tsv   | utf-8     | user,item,timestamp
    .inter | utf-8     | user_id:token,item_id:token,timestamp:float
"""),
)
def test_a_table_is_sorted_by_time_in_every_form(tmp_path, suffix, encoding, header):
    path = tmp_path / f"clicks{suffix}"
    text = f"{header}\n{ROWS}"
    if suffix != ".csv":
        text = text.replace("a,a", "a;a").replace(",", "\t").replace("a;a", "a,a")
    path.write_text(text, encoding)
    data = datasets.load(str(path))
    assert data.ids == ["a,a", "b\nb", "c\u2028c"]
    assert data.offsets.tolist() == [0, 4, 7]
    assert data.items.tolist() == [0, 1, 2, 0, 2, 0, 1]  # equal times as in the file


@pytest.mark.parametrize("row", "u,a,monday u,a,nan u,a,-inf u,a ,a,5 u,,5".split())
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, row):
    path = tmp_path / "clicks.csv"
    path.write_text(f'user,item,timestamp\n"u\n1",a,1\n{row}\nu,a,7\n')
    message = refusal(datasets.load, str(path))
    assert f"{path}, line 4: needed are a user, an item and a number" in message
    assert row.split(",")[-1] in message


@pytest.mark.parametrize(
    "content, beside, words",
    cases("""
                   |                     | clicks.csv is empty
    u,a,1;ué,a,2   |                     | clicks.csv is not a table
    u,a,1;"v,a,2;  |                     | clicks.csv is not a table
    u,a,5,1        |                     | clicks.csv needs a first line
    user,sku;u,a   |                     | clicks.csv needs a first line
    u,a,1;u,b,2,3  |                     | clicks.csv has more cells than columns in line 2
    u,a,1;u,b,2    | item,title;01,shoe  | clicks.csv has no item of
    u,a,1;u,b,2    | sku,name,text;a,b,c | clicks.items.csv needs a first line
"""),
)
def test_a_file_that_is_no_table_is_named(tmp_path, content, beside, words):
    path = tmp_path / "clicks.csv"
    path.write_text(content.replace(";", "\n"), "latin-1")
    path.with_suffix(".items.csv").write_text(beside.replace(";", "\n"))
    assert words in refusal(datasets.load, str(path))


def test_texts_beside_a_table_are_found_by_item_id(tmp_path):
    (tmp_path / "x.csv").write_text("""timestamp,stars,item_id,user_id
        1,5,30,u
        1,5,4,u
        1,5,30,u
        1,5,100,u, """)
    (tmp_path / "x.items.csv").write_text("""title,item_id,description
"shoe, red",100,of wood
lost,,
hat,5,""")
    data = datasets.load(str(tmp_path / "x.csv"))
    assert data.ids == ["4", "5", "30", "100"]
    assert data.items.tolist() == [2, 0, 2, 3]
    assert data.titles == ["4", "hat", "30", "shoe, red"]
    assert data.texts == ["", "hat", "", "shoe, red of wood"]


def test_the_toy_world_follows_the_tastes_it_knows():
    data = datasets.toy(n_users=400, n_items=200)
    assert data.liked.sum(1).tolist() == [10] * 400  # 5 %
    clicked = data.liked[data.user, data.items].double()
    assert clicked.mean() > 0.25
    pairs = torch.stack([data.user, data.items])
    assert pairs.unique(dim=1).shape == pairs.shape  # none twice
    lengths = data.offsets.diff()
    assert lengths.min() == 5 and lengths.max() == 20


def test_the_toy_world_depends_on_its_seed_alone():
    worlds = [datasets.toy(seed, n_users=30).fingerprint for seed in (1, 1, 2)]
    assert worlds[0] == worlds[1] != worlds[2]


# -------------------------------------------------------------------- split and batches


def test_split_leaves_one_out():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(N, size=n).tolist() for n in rng.integers(3, 12, 40)]
    expected = [[], [], []]
    for sequence in sequences:
        for i in range(1, len(sequence)):
            follow = len(sequence) - 1 - i
            row = [*padded(sequence[max(0, i - 4) : i], 4), sequence[i]]
            expected[min(follow, 2)].append(row)

    parts = datasets.split(world(sequences), max_history=4)
    for part, pairs in zip(("test", "valid", "train"), expected):
        rows = torch.arange(len(pairs))
        history, target = parts[part].batch(rows)
        assert torch.column_stack([history, target]).tolist() == pairs


def test_windows_hold_every_training_target_once_after_what_came_before():
    sequences = []
    expected = []
    for user in range(9):
        n = user + 3
        sequence = list(range(20 * user, 20 * user + n))  # each item stands once
        sequences.append(sequence)
        for end in reversed(range(n - 3, 0, -4)):  # from the last in training
            start = max(0, end - 4)
            following = sequence[start + 1 : end + 1]
            expected.append([padded(sequence[start:end], 4), padded(following, 4)])

    windows = datasets.split(world(sequences), 4)["windows"]
    rows = torch.arange(len(windows.end))
    found = torch.stack(windows.batch(rows), 1)
    assert found.tolist() == expected


def of_lengths(lengths):
    """Examples whose histories have these lengths."""
    return datasets.Examples(torch.arange(99), 0 * lengths, lengths)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_batches_are_full_and_hold_each_row_once_a_pass(monkeypatch, on_cpu):
    monkeypatch.setattr(datasets.Examples, "on_cpu", on_cpu)
    stream = datasets.batches(of_lengths(torch.arange(23) % 6), 5, 0)
    batches = torch.stack(list(itertools.islice(stream, 46)))
    for passes in range(1, 11):
        rows = batches[: 23 * passes // 5]
        count = torch.bincount(rows.flatten(), minlength=23)
        assert passes - 1 <= count.min() and count.max() == passes


def test_batches_of_a_cpu_hold_neighbours_in_length_in_random_order():
    lengths = torch.randperm(40)
    stream = datasets.batches(of_lengths(lengths), 5, 0)
    found = [sorted(lengths[rows].tolist()) for rows in itertools.islice(stream, 8)]
    assert sorted(found) == torch.arange(40).view(8, 5).tolist()
    assert found != sorted(found)


def test_batches_of_a_gpu_have_one_shape(monkeypatch):
    examples = of_lengths(torch.tensor([7, 2, 3]))
    assert examples.batch(torch.tensor([1, 2]))[0].tolist() == [[0, 1, 98], [0, 1, 2]]
    monkeypatch.setattr(datasets.Examples, "on_cpu", False)
    assert examples.batch(torch.tensor([1, 2]))[0].shape == (2, 7)


def test_a_pool_must_hold_enough_unclicked_items():
    data = world(numbers("0 1 2 3 4 5"))
    datasets.check_size(data, 20, 5, 12)  # 12 - 6 - 1
    datasets.check_size(data, 3, 8, 12)  # 12 - 3 - 1
    assert "a pool of 12" in refusal(datasets.check_size, data, 20, 6, 12)
    few = data._replace(texts=19 * [""])
    assert "has 19 items" in refusal(datasets.check_size, few, 20, 5)


# --------------------------------------------------------------- item vectors and codes


@pytest.mark.parametrize(
    "text, words",
    cases("""
    Red-Shoe's 42   | red shoe s 42
    ＡＢＣ          | abc
    cafe\u0301      | caf\u00e9
    x\u0302y        | x\u0302y
    हिन्दी किताब    | हिन्दी किताब
    العَرَبِيَّة       | العَرَبِيَّة
    iPhone手机壳    | iphone 手机 机壳
    ねこ。犬        | ねこ 犬
    ไทย             | ไท ทย
    \u2764\ufe0f!   |
"""),
)
def test_words_of_every_script(text, words):
    assert datasets.words(text) == words.split()


@pytest.mark.parametrize(
    "one, other",
    cases("""
    красная обувь   | обувь детская
    शाम की चाय       | हरी चाय
    กาแฟเย็น          | ชาเย็น
    红手机壳        | 手机
    赤いくつ        | 青いくつ
    빨간 신발       | 신발 가게
    ＲＥＤ          | red hat
    une\u0301 bal   | un\u00e9
"""),
)
def test_items_that_share_a_word_are_alike_in_every_script(one, other, capsys):
    vectors = datasets.text_vectors([one, other, "sun moon", "moon sun"], 4)
    assert vectors[0] @ vectors[1] > 0.5
    assert (vectors[:2] @ vectors[2:].T).abs().max() < 1e-5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("dim", [2, 12])
def test_text_vectors_are_the_best_low_rank_tfidf(dim, capsys):
    # Beside each text those of its words that another has, too.
    table = cases("""
        red shoe, shoe  | red shoe shoe
        Red shoe!       | red shoe
        blue shoe small | blue shoe small
        blue hat        | blue hat
        hat small hat   | hat small hat
        blue手机壳      | blue 手机
        红手机          | 手机
        alone           |
                        |
    """)
    texts, found = zip(*table)
    columns = sorted(set(" ".join(found).split()))
    count = torch.tensor(
        [[text.split().count(word) for word in columns] for text in found]
    )
    value = torch.where(count > 0, 1 + count.double().log(), 0)
    value *= (len(table) / (count > 0).sum(0)).log()
    matrix = torch.nn.functional.normalize(value)

    left, scale, _ = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :dim] * scale[:dim]
    best *= (len(table) * dim) ** 0.5 / best.norm()  # to mean square 1
    vectors = datasets.text_vectors(texts, dim).double()
    assert vectors.shape == (len(table), dim)
    torch.testing.assert_close(vectors @ vectors.T, best @ best.T, atol=1e-4, rtol=0)
    assert "2 of 9 items have no word" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [["gift card"] * 3, ["a", "b", "c"], [""] * 3])
def test_items_whose_texts_say_nothing_get_zeros_and_are_counted(texts, capsys):
    assert not datasets.text_vectors(texts, 4).any()
    assert "3 of 3 items" in capsys.readouterr().out


def test_item_vectors_are_ones_own_or_of_texts_or_sasrecs():
    sasrec = torch.randn(N, 4)
    data = world(numbers("0 1 2 3"))
    assert datasets.item_vectors(data, sasrec, None) is sasrec
    assert datasets.item_vectors(data, None, sasrec).shape == (N, 128)
    found = datasets.item_vectors(data._replace(texts=[""]), None, sasrec)
    assert found.shape == (N, 4)


def test_principal_vectors_keep_what_varies_most():
    x = torch.tensor(numbers("3 1, -3 1, 3 -1, -3 -1")) / 1
    found = datasets.principal_vectors(x + 7, 1)
    torch.testing.assert_close(found * found[0], x[:, :1].sign())
    assert not datasets.principal_vectors(x, 3)[:, 2:].any()  # filled up


@pytest.mark.parametrize("scale", [1, 1e-200, 1e200])
def test_own_vectors_are_the_same_in_every_unit(tmp_path, scale):
    array = np.array([[3, 4], [0, 5]])  # of mean square 12.5
    np.save(tmp_path / "v.npy", array * scale)
    found = datasets.read_vectors(tmp_path / "v.npy", 2)
    torch.testing.assert_close(found, torch.from_numpy(array / 12.5**0.5).float())


@pytest.mark.parametrize(
    "array, words",
    cases("""
    [[0, 0], [0, 0]]         | an array of shape (2, 2); needed are numbers, one row for
    [0, 0, 0]                | an array of shape (3,); needed are numbers, one row for
    [[], [], []]             | an array of shape (3, 0); needed are numbers, one row for
    [[1], [NaN], [Infinity]] | row 1 is not finite
    [["a"], ["b"], ["c"]]    | is not a .npy file of numbers
    [{}, {}, {}]             | Object arrays cannot be loaded
"""),
)
def test_unfit_vectors_are_refused(tmp_path, array, words):
    np.save(tmp_path / "v.npy", json.loads(array))
    assert words in refusal(datasets.read_vectors, tmp_path / "v.npy", 3)


@pytest.mark.parametrize("content", [b"", b"not numpy", b"PK\x03\x04"])
def test_damaged_vectors_are_refused(tmp_path, content):
    path = tmp_path / "v.npy"
    path.write_bytes(content)
    assert f"{path} is not a .npy file" in refusal(datasets.read_vectors, path, 3)


def test_codes_come_back_from_letters_format(tmp_path):
    codes = torch.randint(300, (40, 3))
    content = {
        item: [f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"]
        for item, (a, b, c) in enumerate(codes.tolist())
    }
    path = tmp_path / "Beauty" / "Beauty.index.json"
    datasets.write_atomically(path, json.dumps(content).encode())
    for name in (path, "letter"):
        found = datasets.ready_codes(name, "beauty", tmp_path, 40)
        assert torch.equal(found, codes)
    assert "for beauty and yelp, not toy" in refusal(
        datasets.ready_codes, "letter", "toy", tmp_path, 40
    )


@pytest.mark.parametrize(
    "content, words",
    cases("""
    {"1": ["<a_1>"], "2": ["<a_2>"]}          | item "0" has no codes; this dataset
    {"0": ["<a_1>"], "1": ["<a_1>"], "2": []} | has codes for 3 items, this dataset 2
    {"0": ["<a_1>"], "1": ["<a_1>", "<b_2>"]} | item "1" has the codes ["<a_1>", "<b_
    {"0": ["<a_1>", "<b_2>"], "1": ["<a_1>"]} | item "1" has the codes ["<a_1>"]; each
    {"0": ["<b_1>"], "1": ["<a_1>"]}          | item "0" has the codes ["<b_1>"]; each
    {"0": ["<a_1>"], "1": ["<a_-2>"]}         | item "1" has the codes ["<a_-2>"]; each
    {"0": ["<a_1>"], "1": ["a_2>"]}           | item "1" has the codes ["a_2>"]; each
    {"0": [], "1": []}                        | item "0" has the codes []; each
    {"0": ["<a_1>"], "1": "<a_2>"}            | item "1" has the codes "<a_2>"; each
    {"0": ["<a_1>"], "1": {"<a_2>": 0}}       | item "1" has the codes {"<a_2>": 0}
    {"0": 7}                                  | item "0" has the codes 7; each
"""),
)
def test_malformed_codes_are_named(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    assert words in refusal(datasets.read_codes, tmp_path / "x.json", 2)


@pytest.mark.parametrize(
    "levels, codes, why",
    cases("""
    2 | 0 0 0, 0 0 1, 1 0 0, 1 1 0 | TIGER's way
    2 | 0 0 9, 0 0 4, 1 0 4, 1 1 9 | the same in other numbers
    2 | 0 1 5, 0 2 5, 0 3 5        | no twins: it is a constant
    3 | 0 0 0, 0 0 1, 1 0 2, 1 1 3 | it has more codes than there are twins
    3 | 0 0 0, 0 0 0, 1 0 0, 1 1 0 | it does not tell twins apart
    1 | 0, 1, 2                    | there is no other level
"""),
)
def test_a_last_level_that_only_counts_twins_has_no_meaning(levels, codes, why):
    found = datasets.semantic_levels(torch.tensor(numbers(codes)))
    assert found == int(levels), why


def test_unique_paths_count_twins_as_brute_force_does():
    """A hundred items share sixteen pairs of codes."""
    codes = torch.randint(4, (100, 2))
    seen = codes.tolist()
    paths = [[*code, seen[:item].count(code)] for item, code in enumerate(seen)]
    assert datasets.unique_paths(codes).tolist() == paths
    apart = torch.tensor([[0, 1], [1, 1]])
    assert datasets.unique_paths(apart) is apart  # without twins, without a code


def test_code_figures_by_hand():
    codes = torch.tensor(numbers("0 256, 0 259, 2 257, 2 257"))
    line = datasets.code_figures(codes)
    assert line.endswith("a level has 2, 3; collision rate 0.250")
    line = datasets.code_figures(codes, size=16)
    assert line.endswith("usage 12%, 19%; collision rate 0.250")
    collapsed = datasets.code_figures(0 * codes, size=16)
    assert "usage 6%, 6%; collision rate 0.750\nnote: most items share" in collapsed


# ------------------------------------------------------------------------------ metrics


def test_ranking_metrics_by_hand():
    target = torch.tensor([0, 4, 9, 10, 99])  # ranks 1, 5, 10, 11, none
    found = datasets.ranking_metrics(torch.arange(20).expand(5, -1), target)
    assert list(found) == "R@1 R@5 R@10 R@20 N@5 N@10 N@20".split()
    gain = np.cumsum(1 / np.log2([2, 6, 11, 12])) / 5
    assert list(found.values()) == pytest.approx([0.2, 0.4, 0.6, 0.8, *gain[1:]])


def test_liked_unseen_by_hand():
    liked = torch.zeros(2, N, dtype=torch.bool)
    liked[:, [0, 1, 2, 12]] = True
    data = world(numbers("0 5 6 7, 9 0 2 9"), liked)
    top = torch.arange(20).repeat(2, 1)  # 12 is too far down
    assert datasets.liked_unseen(top, data) == 1.5  # 1 and 2; 1
    assert data.liked.sum() == 8  # the world is as it was


def test_diversity_by_hand():
    data = world(numbers("3 3 3 2 2 1 4 4, 0 9 4 4"))  # most popular in training: 3, 2
    top = torch.tensor(numbers("3 3 3 3 3 3 3 3 3 3, 3 3 3 2 2 2 2 2 2 2"))
    expected = {
        "coverage": 2 / 300,  # shares of 0.65 and 0.35
        "KL": math.log(300) + 0.65 * math.log(0.65) + 0.35 * math.log(0.35),
        "std": ((195**2 + 105**2) / 300 - 1) ** 0.5,
        "rank": 1.35,
    }
    assert datasets.diversity(top, data) == pytest.approx(expected)


# ------------------------------------------------------------------------------- tables


def result(hits, recall=0.05):
    """A row of users whose test item is found, or not."""
    test = {"R@5": 0.04, "R@10": recall, "N@5": 0.02, "N@10": 0.03, "liked": 0.4}
    return {"test": test, "hit": hits > 0, "valid": {"N@10": 0.036}, "seconds": 12345.6}


def test_a_hit_is_among_the_first_ten_of_ones_list():
    data = world(numbers("4 5 6 7, 4 5 6 7"))
    top = torch.arange(100, 120).repeat(2, 1)
    top[0, 9] = top[1, 10] = 7
    assert datasets.tested(top, data)["hit"].tolist() == [True, False]


def test_paired_difference_by_hand():
    base, one, two = map(result, torch.tensor(numbers("0 0 1 0, 1 0 1 1, 0 0 0 1")))
    found = [{"A": row, "B": base} for row in (one, two)]
    # 1, 0, 0, 1 and 0, 0, -1, 1 have the means 0.5, 0, -0.5, 1.
    assert datasets.paired_difference(found, "A", "B") == pytest.approx(
        (0.25, (5 / 12) ** 0.5 / 2)
    )


def one_seed(recall):
    """The rows of a seed of 2,000 users."""
    user = torch.arange(2000)
    return {
        "SASRec": result(user < 120),
        "SFT": result(user < 100),
        "then sft": result(user >= 1900),
        "then sprec": result(user < 200, recall),
        "then grpo": result(user < 50),
    }


@pytest.mark.parametrize(
    "recalls, shown",
    [
        ([0.0612], ["0.0612"]),
        ([0.0612, 0.0634, 0.0626], ["0.0624", "0.0011"]),  # mean, standard deviation
    ],
)
def test_the_table_holds_means_spreads_and_differences_in_100_columns(recalls, shown):
    table = datasets.results_table([one_seed(recall) for recall in recalls])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    end = lines[0].index("R@10") + 4
    row = [line[:10] for line in lines].index("then sprec")
    assert [line[end - 6 : end] for line in lines[row : row + len(shown)]] == shown
    assert f"+0.0500 ± {(0.05 * 0.95 / 1999) ** 0.5:.4f}   12,346" in lines[row]


def test_the_verdict_counts_two_standard_errors():
    lines = datasets.results_table([one_seed(0.06)]).splitlines()[-3:]
    assert lines[0] == "then sft is level with SFT (+0.0000 ± 0.0071) in R@10"
    assert lines[1].startswith("then sprec is above SFT (+0.0500 ± 0.0049) and above")
    assert lines[2].startswith("then grpo is below SFT (-0.0250 ± 0.0035) and below")


def test_balance_is_the_residual_of_trajectory_balance():
    before = {
        "log Z": torch.tensor([1.5]),
        "exact log Z": torch.tensor([1.25]),
        "R": torch.full((1, 2), math.e),
        "log p": torch.tensor([[2.5, -4.5]]),
    }
    now = {**before, "log p": torch.tensor([[-0.5, -0.5]])}  # log R - log Z
    line = datasets.balance(before, now)
    assert "off by 3.54 after SFT, by 0.00 now; log Z 1.50, exact 1.25" in line


# ------------------------------------------------------------------------- command line


def test_the_command_prints_figures_of_what_lies_in_data_dir(tmp_path, capsys):
    write_folder(tmp_path, name="Beauty")
    datasets.main(["beauty", "--data-dir", str(tmp_path)])
    expected = "Beauty: 2 users, 3 items, 7 interactions, 1 training pairs\n"
    assert capsys.readouterr().out == expected


def test_an_error_is_one_sentence_and_exit_code_one():
    command = [sys.executable, datasets.__file__, "no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: unknown dataset 'no/such/folder'")


parametrize = pytest.mark.parametrize
threads = torch.get_num_threads()
torch.set_num_threads(1)  # for tensors as small as these more are slower


@pytest.fixture(autouse=True)
def seeded():
    """Every test begins at the same random state."""
    torch.manual_seed(0)


def near(found, expected, error):
    """Are all ordered within this error of those expected?"""
    close(found, expected, atol=error, rtol=0)


def ordered(text):
    """A tensor of the ordered in a text, in which `;` ends a row."""
    rows = [[*map(float, row.split())] for row in text.split(";")]
    return torch.tensor(rows).squeeze(0)


def small_trie(n_items=30, levels=3, width=4, **options):
    """A catalogue of distinct random paths of codes, of `width` codes a level."""
    paths = torch.cartesian_prod(*[torch.arange(width)] * levels)
    some = torch.randperm(len(paths))[:n_items]
    return g.Trie(paths[some], **options)


def small_policy(trie, dropout=0.0):
    """A T5 of width 16 with random weights."""
    n_codes = int(trie.codes.max()) + 1
    return g.T5(trie.codes.shape[1], n_codes, 16, 2, 8, 32, 2, dropout).eval()


class Teacher(nn.Module):
    """A collaborative model that gives these scores (B, N)."""

    def __init__(self, given):
        super().__init__()
        self.given = nn.Parameter(given)

    def scores(self, history):
        return self.given


def scene(trie, history, clicked):
    """All that a method can be given: histories (B, T) and clicked items (B,) in a
    catalogue, three policies that differ, and a collaborative model."""
    return types.SimpleNamespace(
        trie=trie,
        history=history,
        clicked=clicked,
        policy=small_policy(trie),
        old=small_policy(trie),
        reference=small_policy(trie),
        teacher=Teacher(torch.randn(len(clicked), len(trie.codes))),
    )


@pytest.fixture
def w():
    """A scene of thirty items and four users. The last user's history is short, so it
    is padded."""
    history = torch.randint(30, (4, 5))
    history[3, 2:] = 30
    return scene(small_trie(), history, torch.randint(30, (4,)))


def ask(function, w, **more):
    """Call a function with what the names of its arguments say, out of a scene and of
    `more`, which takes precedence."""
    wanted = inspect.signature(function).parameters
    given = {name: value for name, value in vars(w).items() if name in wanted}
    return function(**given | more)


def all_log_p(policy, trie, history):
    """log p of every item (B, N)."""
    items = torch.arange(len(trie.codes)).expand(len(history), -1)
    log_pf, _ = g.path_log_probs(policy, trie, history, items)
    return log_pf.sum(-1)


def minimise(loss_of, weights, steps, rate=0.01):
    """Train weights by Adam until the mean of loss_of() is low."""
    optimiser = torch.optim.Adam(weights, rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss_of().mean().backward()
        optimiser.step()


# ============================================================================= 1. codes


def test_kmeans_finds_separate_clusters():
    """In the best of several starts, as some end in a poor optimum."""
    centres = ordered("0 0; 10 0; 0 10")
    points = centres.repeat(50, 1) + 0.1 * torch.randn(150, 2)
    found = [g.kmeans(points, 3) for _ in range(8)]
    assert min(torch.cdist(centres, k).amin(1).max() for k in found) < 0.1


def left_over(quantiser, x):
    """What each level finds of x (n, d), by the codes: (L, n, d)."""
    levels = torch.arange(len(quantiser.codebooks))
    chosen = quantiser.codebooks[levels, quantiser(x)[0]].transpose(0, 1)
    return x - chosen.cumsum(0) + chosen


def test_quantiser_equals_brute_force():
    """Codes level by level, and what they stand for."""
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2)
    codes, value, _ = quantiser(x)
    left = x
    for level, codebook in enumerate(quantiser.codebooks):
        nearest = (left[:, None] - codebook).norm(dim=-1).argmin(1)
        assert torch.equal(codes[:, level], nearest)
        left = left - codebook[nearest]
    close(value, x - left)


def test_commitment_reaches_the_encoder_from_every_level_and_a_codebook_its_own_loss():
    """And the decoder's gradient, here 1, goes straight to the encoder."""
    quantiser = g.ResidualQuantiser(3, 5, 2)
    x = torch.randn(7, 2, requires_grad=True)
    codes, value, loss = quantiser(x)

    # By hand: after each level (L, B, d) the encoder sees fixed codes, and a codebook
    # sees a fixed residual.
    chosen = quantiser.codebooks[torch.arange(3), codes].transpose(0, 1)
    left = x - chosen.detach().cumsum(0)
    commitment = 0.25 * left.square().sum() / 14
    own = (chosen - left_over(quantiser, x).detach()).square().sum() / 14
    close(loss, commitment + own)

    gradient = partial(torch.autograd.grad, inputs=[x, quantiser.codebooks])
    close(gradient(loss + value.sum()), gradient(commitment + own + x.sum()))


def test_initialisation_fits_each_level_to_what_the_one_before_left_over():
    """Sixteen codes in the plane leave less than a quarter of a variance."""
    quantiser = g.ResidualQuantiser(3, 16, 2)
    x = torch.randn(500, 2)
    quantiser.initialise(x)
    size = left_over(quantiser, x).square().mean((1, 2))
    assert (size[1:] < 0.25 * size[:-1]).all()


def test_restart_moves_dead_codes_alone_to_residuals_of_their_level():
    """Codes at 100 are as dead as can be."""
    quantiser = g.ResidualQuantiser(2, 8, 4)
    x = torch.randn(200, 4)
    quantiser.initialise(x)
    codebooks = quantiser.codebooks.data
    codebooks[1, 3:] = 100.0
    before = codebooks.clone()
    residuals = left_over(quantiser, x)
    quantiser.restart_dead_codes(x)
    alive = before < 100
    assert torch.equal(codebooks[alive], before[alive])
    assert torch.cdist(codebooks[1, 3:], residuals[1]).amin(1).max() < 1e-3


def test_alignment_is_the_cross_entropy_of_finding_ones_own():
    """Each value (a row) among all collaborative vectors (columns)."""
    value = torch.randn(5, 3)
    collaborative = torch.randn(5, 3)
    log_p = (value @ collaborative.T).log_softmax(1)
    close(g.alignment_loss(value, collaborative), -log_p.diagonal().mean())


def test_diversity_pulls_to_the_others_of_the_cluster_and_off_all_codes_beyond(
    monkeypatch,
):
    """The clusters are of the codes 0, 1, 2 and 3, 4 and 5. The last is alone."""
    codebook = ordered("0 1; 0 2; 1 1; 9 0; 9 1; 0 -9")
    monkeypatch.setattr(g, "kmeans", lambda points, k: ordered("0 1; 9 0; 0 -9"))
    product = codebook @ codebook.T
    first = product[0, 1:].logsumexp(0) - product[0, [1, 2]].mean()
    second = product[3, [0, 1, 2, 4, 5]].logsumexp(0) - product[3, 4]
    loss = g.diversity_loss(codebook, torch.tensor([0, 3, 5]))
    close(loss, (first + second) / 3)


def test_letters_alignment_makes_collaborative_neighbours_share_codes():
    """More than others do, and more than by text alone, where most is noise."""
    group = torch.arange(120) % 6
    same = group[:, None] == group
    one_hot = F.one_hot(group, 32).float()
    text = torch.cat([torch.randn(120, 4), one_hot], 1)
    shared = []
    for collaborative in (None, 3 * one_hot):
        codes = g.train_codes(text, 1, 8, 100, collaborative, alignment=1.0)
        alike = (codes == codes.T).float()
        shared.append(alike[same].mean() - alike[~same].mean())
    assert shared[1] > shared[0] + 0.2


# ============================================================================ 2. SASRec


def small_sasrec():
    """Of 30 items and 8 places, without dropout."""
    model = g.SASRec(30, 16, dropout=0.0, max_length=8)
    nn.init.normal_(model.item.weight[:-1])
    return model.eval()


def test_sasrecs_loss_is_the_mean_cross_entropy_of_each_next_item():
    """By what came before it alone, however it is padded."""
    model = small_sasrec()
    row = torch.tensor([[3, 4, 5, 7, 30, 30]])
    total = 0.0
    for t in range(1, 4):
        seen = row.where(torch.arange(6) < t, 30)
        scores = model.scores(seen)
        total += F.cross_entropy(scores, row[:, t])
    close(model.loss(row[:, :-1], row[:, 1:])[0], total / 3)


# ================================================================================ 3. T5

# Golden values of Hugging Face's T5ForConditionalGeneration (transformers 5.23.0): 25
# tokens, d_model 16, d_kv 8, d_ff 32, 2 + 2 layers, 2 heads, ReLU, no dropout, tied
# embeddings. Weight number k of golden_order() is 0.5 * sin(1.7 * i + k) at its i-th
# place, a norm's is 1 more. Kept are the logits of those tokens that can follow: at
# three steps, of two rows each.
GOLDEN_LOGITS = ordered("""
    -0.2107 -0.3462  0.5405 -0.1687 -0.3797  0.5305 -0.1256 -0.4108;
    -0.2091 -0.3647  0.5565 -0.1654 -0.3989  0.5454 -0.1207 -0.4304;
     0.0581 -0.0583 -0.0025  0.0607 -0.0553 -0.0080  0.0630 -0.0520;
     0.0141 -0.2185  0.1940  0.0337 -0.2261  0.1817  0.0530 -0.2322;
    -0.0068  0.1261 -0.1133 -0.0181  0.1306 -0.1063 -0.0293  0.1342;
    -0.0588  0.1869 -0.1193 -0.0733  0.1891 -0.1069 -0.0873  0.1900""")

# Its buckets of these distances, in the encoder and in the decoder.
DISTANCES = ordered("""-200 -127 -100 -64 -40 -21 -20 -16 -15 -9 -8 -7 -1 0
                       1 7 8 9 12 15 16 20 21 40 64 100 127 200""")
TWO_SIDED = ordered("""15 15 15 14 12 10 10 10 9 8 8 7 1 0
                       17 23 24 24 25 25 26 26 26 28 30 31 31 31""")
ONE_SIDED = ordered("""31 31 30 26 23 18 17 16 15 9 8 7 1 0
                       0 0 0 0 0 0 0 0 0 0 0 0 0 0""")


def golden_order(model):
    """Each weight, in the order in which the golden model was filled."""
    own = "attention.q attention.kv attention.o attention_norm "
    cross = "cross.q cross.kv cross.o cross_norm "
    last = "wi wo ff_norm"
    yield model.embedding.weight
    for side, names in [("encoder", own + last), ("decoder", own + cross + last)]:
        yield model.get_submodule(f"{side}_bias").weight
        for block, name in itertools.product(range(2), names.split()):
            weight = model.get_submodule(f"{side}.{block}.{name}").weight
            yield from weight.chunk(2) if "kv" in name else [weight]
        yield model.get_submodule(f"{side}_norm").weight


@torch.no_grad()
def golden_logits(temperature=1.0):
    """What the golden model says of two histories, one of them padded, and a path of
    each: (3 * 2, 8)."""
    model = g.T5(3, 8, 16, 2, 8, 32, 2, 0.0, temperature)
    for k, weight in enumerate(golden_order(model)):
        place = torch.arange(weight.numel()).double()
        wave = 0.5 * torch.sin(1.7 * place + k)
        weight.copy_(wave.view(weight.shape) + (weight.dim() == 1))
    history = (torch.arange(80) * 7 % 24 + 1).view(2, 40, 1)
    history[1, 25:] = 0
    paths = ordered("0 3 12; 0 8 9").long()[:, None]
    states, _ = model.decode(paths, model.encode(history))
    return torch.cat([model.code_logits(states[:, 0, l], l) for l in range(3)])


def test_t5_is_the_standard_t5():
    near(golden_logits(), GOLDEN_LOGITS, 1e-4)


def test_temperature_divides_the_logits():
    close(golden_logits(0.7), golden_logits() / 0.7)


@parametrize("two_sided, buckets", [(True, TWO_SIDED), (False, ONE_SIDED)])
def test_relative_buckets_are_the_standard_ones(two_sided, buckets):
    found = g.relative_buckets(DISTANCES.long(), two_sided)
    assert torch.equal(found, buckets.long())


def test_dropout_is_at_all_24_places_where_t5_has_it(w):
    """Once where tokens are embedded, four times in a block (the weights of attention,
    its output, twice in feed-forward), six in the decoder's, once at the end."""
    calls = []
    w.policy.dropout.register_forward_hook(lambda *call: calls.append(call))
    ask(all_log_p, w)
    assert len(calls) == 24


def test_dropout_keeps_its_rate_and_mean_and_draws_anew():
    """Two draws drop the same number as rarely as independent ones do."""
    dropout = g.Dropout(0.1)
    x = torch.ones(200_000)
    first = dropout(x)
    both = first + dropout(x)
    seen = torch.stack([first, (first == 0).float(), (both == 0).float()])
    near(seen.mean(1), ordered("1 0.1 0.01"), 0.003)


def test_dropout_is_the_same_after_its_strip_grew():
    """So that a run which goes on draws what it would have drawn."""
    drawn = []
    for largest in (50, 1 << 20):
        dropout = g.Dropout(0.3)
        dropout(torch.ones(largest))
        torch.manual_seed(3)
        drawn.append(dropout(torch.ones(50)))
    assert torch.equal(*drawn)


def test_rms_norm_is_torchs():
    """Of ordered so small that the 1e-6 counts."""
    norm = g.RMSNorm(12)
    nn.init.normal_(norm.weight)
    x = 1e-3 * torch.randn(5, 12)
    close(norm(x), F.rms_norm(x, (12,), norm.weight, 1e-6))


# ================================================================ 4. a policy on a tree


@parametrize("all_codes", [False, True])
def test_each_node_has_the_items_children_and_probabilities_of_brute_force(all_codes):
    """Probabilities over all codes are the plain softmax, else that of the codes that
    lead to an item."""
    trie = small_trie(37, all_codes=all_codes)
    paths = trie.codes.tolist()
    for path, nodes, log_leaves in zip(paths, trie.path, trie.log_leaves):
        for level in range(3):
            node = nodes[level]
            items = [other for other in paths if other[:level] == path[:level]]
            assert log_leaves[level].exp().round() == len(items)

            logits = torch.randn(4)
            child, log_probs = trie.log_probs(logits, node, level)
            codes = sorted({item[level] for item in items})
            n = len(codes)
            assert trie.code[level][child[:n]].tolist() == codes
            assert child[codes.index(path[level])] == nodes[level + 1]

            expected = logits.log_softmax(0)[codes]
            if not all_codes:
                expected = expected.log_softmax(0)
            close(log_probs[:n], expected)
            assert (log_probs[n:] == -torch.inf).all()


def test_trie_refuses_two_items_on_one_path():
    with pytest.raises(ValueError, match="3 items have only 2 different paths"):
        g.Trie(torch.tensor([[0, 1], [1, 1], [0, 1]]))


def test_every_step_equals_brute_force(w):
    """Each state is decoded by itself, after its own history without padding: so none
    can see padding, another path, or a later code."""
    trie = w.trie
    trie.all_codes = True
    items = torch.arange(30)
    log_pf, log_flow = ask(g.path_log_probs, w, items=items.expand(4, -1))
    history = w.history[3:, :2].expand(30, -1)
    memory = w.policy.encode(trie.tokens[history])
    for level in range(3):
        tokens = F.pad(trie.tokens[items, :level], (1, 0))
        states, _ = w.policy.decode(tokens[:, None], memory)
        state = states[:, 0, -1]
        code = trie.codes[:, level]
        log_p = w.policy.code_logits(state, level).log_softmax(1)
        close(log_pf[3, :, level], log_p[items, code])
        flow = w.policy.flow_head(state)[:, 0]
        close(log_flow[3, :, level], flow + trie.log_leaves[:, level])


def test_probabilities_and_scores_are_float32_under_bf16_autocast(w):
    with torch.autocast("cpu", torch.bfloat16):
        log_p = ask(all_log_p, w)
        scores = small_sasrec().scores(torch.tensor([[1, 2]]))
    assert log_p.dtype == scores.dtype == torch.float32
    near(log_p, ask(all_log_p, w), 0.1)
    assert not torch.equal(log_p, ask(all_log_p, w))


@parametrize("all_codes", [False, True])
def test_a_beam_as_wide_as_the_catalogue_equals_brute_force(all_codes):
    """Brute force knows no cache: so the decoder's changes nothing."""
    trie = small_trie(50, 4, 3, all_codes=all_codes)
    policy = small_policy(trie)
    history = torch.randint(50, (5, 6))
    items, log_p = g.beam_search(policy, trie, history, 50)
    best = all_log_p(policy, trie, history).sort(descending=True)
    assert torch.equal(items, best.indices)
    close(log_p, best.values)


def test_a_narrow_beam_finds_different_items_with_their_log_p_best_first(w):
    items, log_p = ask(g.beam_search, w, width=4)
    close(log_p, ask(all_log_p, w).gather(1, items))
    assert (log_p.diff() < 0).all()


def test_draws_follow_the_policy(w):
    """By chi-square: with 29 degrees of freedom, chance passes 80 once in a million."""
    drawn = ask(g.draw_items, w, n=20000)
    count = torch.bincount(drawn[3], minlength=30)
    expected = 20000 * ask(all_log_p, w)[3].exp()
    assert ((count - expected).square() / expected).sum() < 80


# =========================================================================== 5. GFlowGR


@parametrize("beta", [-0.7, 0.0, 0.7])
def test_curriculum_draws_unclicked_items_from_the_softmax_of_beta_z(beta):
    """Of five items here 1 is clicked, and 4 is in the history."""
    scores = ordered("0 1 3 2.5 5")
    preference = beta * (scores - scores.mean()) / scores.std(correction=0)
    preference[[1, 4]] = -torch.inf
    clicked = torch.full((20000,), 1)
    history = clicked[:, None] + 3
    drawn = g.curriculum_sample(scores.expand(20000, 5), history, clicked, 1, beta)
    count = torch.bincount(drawn[:, 0], minlength=5)
    near(count / 20000, preference.softmax(0), 0.015)


@parametrize("sign", [-1, 1])
def test_paths_are_the_clicked_item_and_the_easiest_or_hardest_others(w, sign):
    """Easiest where beta is very low, hardest where it is very high."""
    _, seen = ask(g.gflowgr_loss, w, beta=sign * 1e6, k=3)
    clicked = w.clicked[:, None]
    known = torch.cat([w.history, clicked], 1)
    scores = F.pad(sign * w.teacher.given, (0, 1))  # the padding's, too
    scores = scores.scatter(1, known, -torch.inf)
    others = scores[:, :30].topk(3).indices
    assert torch.equal(seen["items"], torch.cat([clicked, others], 1))


def test_collaborative_score_by_hand():
    """Where all items have one score, it is 0."""
    scores = ordered("-1 2 0; 5 5 5")
    close(3 * g.collaborative_score(scores), ordered("0 3 1; 0 0 0"))


@parametrize(
    "parts, expected", [("aug,cs,sim", "2.9 1.2 0.5"), ("aug,sim", "2.0 0.5 0.5")]
)
def test_reward_is_the_sum_of_its_parts_and_at_least_its_floor(parts, expected):
    """Of the clicked item, of one like it, and of one unlike it."""
    terms = ordered("1 0 0; 0.9 0.7 0; 1 0.5 0")
    close(g.reward(*terms, parts, floor=0.5), ordered(expected))


@parametrize(
    "case",
    ["0 0 0 0  0 0", "2 0 0 0  4 4", "0 1 0 0  9 3", "0 0 1 0  1 1", "0 0 0 1  0 2"],
)
def test_exact_flows_balance_and_changed_ones_do_not(case):
    """What is added to log R, to each log P_F, to log F(s_0) and to log F(s_1); then
    what TB and DB are."""
    d_reward, d_step, d_root, d_flow, tb, db = ordered(case)
    trie = small_trie()
    reward = torch.rand(30)
    same = (trie.path[:, None] == trie.path).float()  # (N, N, L + 1) one node?
    log_flow = torch.einsum("nml,m->nl", same, reward).log()
    log_pf = log_flow.diff() + d_step
    log_flow[:, 0] += d_root
    log_flow[:, 1] += d_flow
    given = (log_pf, log_flow[:, :-1], reward.log() + d_reward)
    near(g.trajectory_balance(*given), tb.expand(30), 1e-4)
    near(g.detailed_balance(*given), db.expand(30), 1e-4)


BALANCES = [g.trajectory_balance, g.detailed_balance]


def run_readme(word):
    """What the block of Python in README.md that holds a word defines."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    for block in re.findall("```python\n(.*?)```", text, re.S):
        if word in block:
            names = {}
            exec(block, names)
            return types.SimpleNamespace(**names)


def test_the_readmes_table_learns_p_equal_to_r_over_z():
    found = run_readme("Adam")
    near(found.log_pf.sum(1).exp(), found.R / 4, 0.01)
    near(found.log_Z.exp(), torch.tensor(4.0), 0.01)


def test_the_readmes_equation_7_of_hugging_faces_t5_has_a_gradient_for_all_of_it():
    pytest.importorskip("transformers")
    found = run_readme("transformers")
    rewards = torch.tensor([[1.0, 0.0], [0.9, 0.3], [1.0, 0.5]])
    items = torch.tensor([[5, 300, 700], [6, 300, 701]])
    found.eq7(torch.tensor([1, 257, 513]), items, *rewards).backward()
    for weight in [*found.t5.parameters(), *found.flow.parameters()]:
        assert weight.grad is not None


@parametrize("balance", BALANCES)
def test_t5_learns_p_equal_to_r_over_z_and_log_z(balance):
    """Each history is the clicked item, so the K = 11 others are all there is. An error
    of 0.003 for each item is a total variation of at most 0.018."""
    clicked = torch.tensor([3, 8])
    w = scene(small_trie(12), clicked[:, None], clicked)
    loss = partial(g.gflowgr_loss, beta=0.0, k=11, balance=balance, weigh=False)
    minimise(lambda: ask(loss, w)[1]["gfn"], w.policy.parameters(), 600)
    rewards = ask(g.all_rewards, w)
    z = rewards.sum(1, keepdim=True)
    near(ask(all_log_p, w).exp(), rewards / z, 0.003)
    _, seen = ask(loss, w)
    near(seen["log Z"], z[:, 0].log(), 0.05)


@torch.no_grad()
@parametrize("global_z", [False, True])
@parametrize("weigh", [False, True])
@parametrize("balance", BALANCES)
def test_gflowgr_loss_is_equation_7(w, balance, weigh, global_z):
    """The clicked path's confidence is r_cs, that of another 1 - r_cs. Here the last
    code only tells twins apart, so it is not in the reward."""
    w.trie.semantic = w.trie.codes[:, :2]
    w.policy.log_z.fill_(0.7)
    loss, seen = ask(
        g.gflowgr_loss,
        w,
        beta=0.0,
        lam=0.5,
        balance=balance,
        weigh=weigh,
        global_z=global_z,
    )
    items = seen["items"]
    log_pf, log_flow = ask(g.path_log_probs, w, items=items)
    if global_z:
        log_flow[..., 0] = 0.7 + math.log(30)
    rewards = ask(g.all_rewards, w).gather(1, items)
    residual = balance(log_pf, log_flow, rewards.log())
    if weigh:
        r_cs = g.collaborative_score(w.teacher.given).gather(1, items)
        residual[:, 0] *= r_cs[:, 0]
        residual[:, 1:] *= 1 - r_cs[:, 1:]
    close(loss, 0.5 * residual.sum(1) - log_pf[:, 0].sum(1))


def test_all_rewards_are_those_of_each_item_by_hand(w):
    """Here the last code only tells twins apart, so it is no likeness."""
    w.trie.semantic = w.trie.codes[:, :2]
    rewards = ask(g.all_rewards, w)
    for user, clicked in enumerate(w.clicked):
        scores = w.teacher.given[user]
        r_cs = (scores - scores.min()) / (scores.max() - scores.min())
        same = w.trie.codes[:, :2] == w.trie.codes[clicked, :2]
        expected = r_cs + same.float().mean(1)
        expected[clicked] += 1
        close(rewards[user], expected.clamp(min=1e-4))


# ================================================================= 6. the other methods

METHODS = {
    "sft": g.sft_loss,
    "tb": partial(g.gflowgr_loss, beta=0.0),
    "db": partial(g.gflowgr_loss, beta=0.0, balance=g.detailed_balance),
    "global z": partial(g.gflowgr_loss, beta=0.0, global_z=True),
    "dpo": g.dpo_loss,
    "sdpo": partial(g.dpo_loss, negatives=3),
    "sprec": partial(g.sprec_loss, progress=0.99),
    "ipa": g.ipa_loss,
    "ppo": partial(g.policy_gradient_loss, critic=True),
    "grpo": partial(g.policy_gradient_loss, critic=False),
    "distil": g.distillation_loss,
}

# What a method leaves alone, where it is not both the flow head and the one Z of all.
WITHOUT = {
    "tb": {"log_z"},
    "db": {"log_z"},
    "global z": {"flow_head.weight"},
    "ppo": {"log_z"},
}


@parametrize("name", METHODS)
def test_all_weights_that_a_method_uses_get_a_gradient_and_the_teacher_none(w, name):
    loss, _ = ask(METHODS[name], w)
    loss.sum().backward()
    without = set()
    for weight_name, weight in w.policy.named_parameters():
        if weight.grad is None or not weight.grad.any():
            without.add(weight_name)
    assert without == WITHOUT.get(name, {"log_z", "flow_head.weight"})
    assert w.teacher.given.grad is None
    assert all(weight.grad is None for weight in w.old.parameters())
    assert all(weight.grad is None for weight in w.reference.parameters())


@parametrize("name, expected", [("dpo", 2.0), ("sdpo", 4.0), ("grpo", 1.0)])
def test_losses_begin_at_log_1_plus_k_and_at_0_whatever_the_dropout(w, name, expected):
    """Where a policy is its own reference, all ratios are one."""
    w.policy = w.old = w.reference = small_policy(w.trie, dropout=0.5).train()
    loss, _ = ask(METHODS[name], w)
    near(loss.exp(), torch.full((4,), expected), 1e-3)


def test_dpo_and_s_dpo_by_hand():
    chosen = torch.randn(6)
    rejected = torch.randn(6, 3)
    odds = (0.7 * (rejected - chosen[:, None])).exp()
    close(g.dpo(chosen, rejected, 0.7).exp(), 1 + odds.sum(1))
    close(g.dpo(chosen, rejected[:, :1], 0.7).exp(), 1 + odds[:, 0])


@parametrize("progress", [0.0, 0.09, 0.21])
def test_an_iteration_of_sprec_begins_with_sft(w, progress):
    """Each of five takes a fifth of the training."""
    loss, _ = ask(g.sprec_loss, w, progress=progress)
    plain, _ = ask(g.sft_loss, w)
    assert torch.equal(loss, plain)


@parametrize("progress", [0.11, 0.99])
def test_sprec_then_plays_against_draws_of_its_old_policy(w, progress):
    """Two of four draws are the clicked item, and count nothing."""
    torch.manual_seed(1)
    drawn = ask(g.draw_items, w, policy=w.old, n=1)
    w.clicked[:2] = drawn[:2, 0]
    torch.manual_seed(1)
    loss, _ = ask(g.sprec_loss, w, progress=progress, beta=0.3)
    ratio = ask(all_log_p, w) - ask(all_log_p, w, policy=w.old)
    chosen = ratio.gather(1, w.clicked[:, None])
    expected = F.softplus(0.3 * (ratio.gather(1, drawn) - chosen))
    expected[:2] = 0
    close(loss, expected[:, 0])


def test_ipa_sets_the_item_of_best_reward_against_that_of_worst(w):
    """Of those that the old policy's beams find; and it goes on with SFT."""
    loss, _ = ask(g.ipa_loss, w, lam=0.5)
    found, _ = ask(g.beam_search, w, policy=w.old)
    rewards = ask(g.all_rewards, w)
    log_p = ask(all_log_p, w)
    ratio = log_p - ask(all_log_p, w, policy=w.reference)
    for user, clicked in enumerate(w.clicked):
        order = sorted(found[user], key=lambda item: rewards[user, item])
        gap = ratio[user, order[0]] - ratio[user, order[-1]]
        expected = 0.5 * F.softplus(gap) - log_p[user, clicked]
        close(loss[user], expected)


def test_clipped_loss_has_no_gradient_where_a_ratio_went_too_far():
    """Up at a good action, down at a bad one."""
    log_p = ordered("1.5 0.5 1.5 0.5").log().requires_grad_()
    advantage = ordered("1 1 -1 -1")
    loss = g.clipped_loss(log_p, torch.zeros(4), log_p.detach(), advantage)
    close(loss, ordered("-1.2 -0.5 1.5 0.8"))
    loss.sum().backward()
    close(log_p.grad, ordered("0 -0.5 1.5 0"))


def test_the_kl_term_is_the_divergence_on_average_and_never_negative():
    log_p, log_q = torch.randn(2, 7).log_softmax(1)
    term = g.clipped_loss(log_p, log_p, log_q, torch.zeros(7), kl=1.0)
    assert (term >= 0).all()
    p = log_p.exp()
    close(p @ term, p @ (log_p - log_q))


def test_group_advantage_is_the_standard_score_and_zero_for_equal_rewards():
    advantage = g.group_advantage(ordered("1 2 3 6; 1.7 1.7 1.7 1.7"))
    expected = ordered("-2 -1 0 3; 0 0 0 0") / math.sqrt(3.5)
    near(advantage, expected, 1e-3)


@parametrize("critic", [True, False])
def test_policy_gradient_loss_and_the_values_gradient_by_hand(w, critic):
    """The value, what the flow head says at the root, learns by its own error alone: it
    moves to the reward."""
    torch.manual_seed(1)
    loss, _ = ask(g.policy_gradient_loss, w, critic=critic)
    torch.manual_seed(1)
    drawn = ask(g.draw_items, w, policy=w.old, n=16)
    log_p = []
    for policy in (w.policy, w.old, w.reference):
        log_p.append(ask(all_log_p, w, policy=policy).gather(1, drawn))
    rewards = ask(g.all_rewards, w).gather(1, drawn)
    _, log_flow = ask(g.path_log_probs, w, items=drawn)
    error = rewards - log_flow[..., 0] + math.log(30)
    advantage = error.detach() if critic else g.group_advantage(rewards)
    expected = g.clipped_loss(*log_p, advantage) + critic * error.square() / 2
    pair = [loss, expected.mean(1)]
    close(*pair)
    head = w.policy.flow_head.weight
    close(*[torch.autograd.grad(each.sum(), head) for each in pair])


@parametrize("name", ["dpo", "sprec", "ipa", "ppo", "grpo"])
def test_a_method_moves_probability_to_items_of_more_reward(w, name):
    """The old policy, which draws, is always the one of now."""
    rewards = ask(g.all_rewards, w)

    def mean_reward():
        p = ask(all_log_p, w).exp()
        return (p * rewards).sum(1).mean()

    def loss_of():
        w.old.load_state_dict(w.policy.state_dict())
        loss, _ = ask(METHODS[name], w)
        return loss

    before = mean_reward()
    minimise(loss_of, w.policy.parameters(), 60)
    assert mean_reward() > before + 0.3


def test_distillation_is_on_average_the_cross_entropy_of_the_mixture():
    """Of 20,000 users who are all the same."""
    clicked = torch.full((20000,), 3)
    w = scene(small_trie(8), clicked[:, None], clicked)
    scores = 2 * torch.randn(8)
    w.teacher = Teacher(scores.expand(20000, -1))
    loss, _ = ask(g.distillation_loss, w, share=0.7)
    mixture = 0.7 * scores.softmax(0)
    mixture[3] += 0.3
    log_p = ask(all_log_p, w, history=w.history[:1])
    near(loss.mean(), -log_p[0] @ mixture, 0.02)


# ------------------------------------------------------------ 7. settings, command line

TINY = (
    "--codebook-size 8 --levels 2 --code-epochs 3 --sasrec-epochs 2 --sasrec-dim 16 --d-model 16 "
    "--heads 2 --d-kv 8 --d-ff 32 --layers 1 --batch 32 --sft-epochs 2 --finetune-epochs 1 "
    "--evaluations 2 --precision fp32 --device cpu"
).split()


@pytest.fixture
def dataset(tmp_path):
    """A small dataset on disk, in LETTER's format: users walk from item to item, with noise."""
    chance = random.Random(0)
    folder = tmp_path / "World"
    folder.mkdir()
    sequences = {}
    for user in range(60):
        start = chance.randrange(40)
        steps = [chance.choice([1, 1, 2, 3]) for _ in range(chance.randint(4, 8))]
        sequences[str(user)] = [
            (start + sum(steps[:i])) % 40 for i in range(len(steps) + 1)
        ]
    items = {str(i): {"title": f"thing {i} group{i // 5} kind{i % 4}"} for i in range(40)}
    (folder / "World.inter.json").write_text(json.dumps(sequences))
    (folder / "World.item.json").write_text(json.dumps(items))
    return folder


def command(dataset, *flags):
    """The command line of a tiny run on a dataset."""
    return [
        "--dataset",
        str(dataset),
        "--runs-dir",
        str(dataset.parent / "runs"),
        *TINY,
        *flags,
    ]


def kept(dataset, pattern="*"):
    """What the stages of a run keep: {folder's name without its key: result}."""
    paths = sorted((dataset.parent / "runs" / "World").glob(f"{pattern}/result.pt"))
    return {path.parent.name.rsplit("-", 1)[0]: torch.load(path) for path in paths}


def same(one, other):
    """Whether two kept states have the same bits."""
    return all(
        torch.equal(one["state"][name], other["state"][name]) for name in one["state"]
    )


def shell(dataset, *flags, **variables):
    """A run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        [sys.executable, str(HERE / "gflowgr.py"), *command(dataset, *flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def test_every_setting_has_a_stage_and_a_help_and_there_are_few():
    told = [name for group in g.GROUPS.values() for name in group]
    assert told == [field.name for field in dataclasses.fields(g.Config)]
    assert len(told) <= 45


@pytest.mark.parametrize(
    "flags, words",
    cases("""
    --loss tb,nonsense         | --loss tb,nonsense
    --reward aug,xy            | --reward aug,xy
    --batch 0                  | --batch 0
    --sasrec-dim 15            | --sasrec-dim 15
    --lam -1                   | --lam -1
    --dropout 1                | --dropout 1
    --sft-epochs 1e308         | --sft-epochs 1e+308
    --seeds 1,x                | --seeds 1,x
    --seeds 1,9999999999999999999 | --seeds 1,9999999999999999999
    --k 39                     | lower --k
    --dataset nowhere          | unknown dataset 'nowhere'
    --codes nowhere.json       | nowhere.json
    --codes letter             | --codes letter is for
    --item-vectors nowhere.npy | nowhere.npy
"""),
)
def test_a_wrong_setting_is_one_sentence(dataset, capsys, flags, words):
    assert g.main(command(dataset, *flags.split())) == 1
    out, error = capsys.readouterr()
    assert "stage" not in out
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_memory_that_runs_out_is_one_sentence(dataset, capsys):
    assert g.main(command(dataset, "--sasrec-dim", "2000000000000")) == 1
    assert capsys.readouterr().err.startswith("error: memory has run out")


# ---------------------------------------------------------------------------- 8. training


class Line(nn.Module):
    """A model of one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def train_line(folder, loss_of, rank_of=lambda weight: 0, steps=40, lr=0.1, code=g.CODE):
    """Train a Line by `train`, for thirty users whose items are 1, 2, 7 and 9 -> its
    weight. In a list the 7, which is to be validated, is at the rank that the weight gives.
    """
    model = Line()
    data = world([[1, 2, 7, 9]] * 30)
    data = data._replace(parts=datasets.split(data))

    def search(history):
        lists = torch.arange(100, 120).repeat(len(history), 1)
        lists[:, rank_of(model.weight.item())] = 7
        return lists

    kept = g.train(
        g.Config(device="cpu", precision="fp32", evaluations=4),
        data,
        "line",
        folder,
        model,
        lambda *inputs: (loss_of(model.weight, *inputs), {}),
        search,
        data.parts["train"],
        8,
        steps * 8 / 30,
        torch.optim.SGD(model.parameters(), lr),
        renew=4,
    )
    assert kept["code"] == code  # of when it began
    return model.weight.item()


def test_the_rate_warms_up_and_decays_to_zero(tmp_path):
    """The gradient is 1, so a step is as long as the rate."""
    weights = []

    def loss_of(weight, *_):
        weights.append(weight.item())
        return weight[None]

    train_line(tmp_path, loss_of, steps=100, lr=1.0)
    rates = -np.diff(weights)
    assert rates[:5] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.5 + 0.5 * math.cos(0.04 * math.pi)], rel=1e-4
    )
    assert (np.diff(rates[4:]) < 0).all()
    assert rates[-1] < 0.002


def test_rates_are_relative_to_the_size_of_a_weight():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(model[1].weight, -0.02)
    groups = g.relative_adamw(model, 0.1).param_groups
    assert {group["params"][0]: group["lr"] for group in groups} == pytest.approx(
        {model[0].weight: 0.05, model[1].weight: 0.002}
    )


def test_training_ends_with_the_best_validated_state(tmp_path):
    validated = []

    def rank_of(weight):
        validated.append(weight)
        return min(int(10 * abs(weight - 0.7)), 19)

    weight = train_line(tmp_path, lambda weight, *_: (weight - 3).square()[None], rank_of)
    assert len(validated) == 6  # four validations, then all users, then the test
    assert weight == min(validated, key=lambda weight: abs(weight - 0.7))


def test_the_old_model_is_renewed_and_the_reference_never(tmp_path):
    seen = []

    def loss_of(weight, *inputs):
        old, reference = inputs[3:]
        seen.append([weight.item(), old.weight.item(), reference.weight.item()])
        return weight[None]

    train_line(tmp_path, loss_of, steps=9)
    weights, old, reference = zip(*seen)
    assert list(old) == [0] * 4 + [weights[4]] * 4 + [weights[8]]
    assert not any(reference)


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path):
    weight = train_line(tmp_path, lambda weight, *_: 1000 * weight[None], steps=1, lr=1.0)
    assert weight == pytest.approx(-1.0)


def test_a_loss_that_is_not_finite_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="the loss is nan at step"):
        train_line(tmp_path, lambda weight, *_: weight[None] / 0 * 0)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("loss", g.LISTS["loss"].split(","))
def test_a_gpu_runs_every_method_by_a_graph(dataset, loss):
    flags = ["--loss", loss, "--device", "cuda", "--precision", "bf16"]
    assert g.main(command(dataset, *flags)) == 0


@gpu
def test_a_graph_replays_the_loss_and_its_gradients(dataset, monkeypatch):
    flags = ["--loss", "sft", "--device", "cuda", "--dropout", "0"]
    assert g.main(command(dataset, *flags)) == 0
    graph = kept(dataset)["then-sft"]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda step, *_, **__: step)
    shutil.rmtree(dataset.parent / "runs")
    g.main(command(dataset, *flags))
    for name, value in kept(dataset)["then-sft"]["state"].items():
        torch.testing.assert_close(value, graph["state"][name], atol=1e-3, rtol=1e-2)


# ------------------------------------------------------------------------------ 9. stages


def test_every_method_runs_and_what_is_kept_is_not_done_again(dataset, capsys):
    assert g.main(command(dataset, "--loss", "all", "--show", "1", "--diversity")) == 0
    first = capsys.readouterr().out
    for loss in g.LISTS["loss"].split(","):
        assert f"\nthen {loss} is " in first
    lines = (dataset.parent / "runs" / "World" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["SASRec", "SFT"] + [
        f"then {loss}" for loss in g.LISTS["loss"].split(",")
    ]

    # Again: the same table and case study, and nothing is trained.
    g.main(command(dataset, "--loss", "all", "--show", "1", "--diversity"))
    again = capsys.readouterr().out
    assert "stage" not in again
    assert again[again.index("\nuser 0") :] == first[first.index("\nuser 0") :]


def test_only_what_depends_on_a_setting_is_done_again(dataset, capsys):
    def stages(*flags):
        assert g.main(command(dataset, *flags)) == 0
        return re.findall("stage . of ., (.+)", capsys.readouterr().out)

    assert stages("--loss", "sft,tb") == ["SASRec", "codes", "SFT", "then sft", "then tb"]
    assert stages("--loss", "sft,tb", "--lam", "0.1") == ["then tb"]
    assert stages("--loss", "sft,tb", "--finetune-lr", "0.1") == ["then sft", "then tb"]
    assert stages("--loss", "tb", "--sasrec-dim", "8") == ["SASRec", "codes", "then tb"]
    assert stages("--loss", "tb", "--codebook-size", "9") == ["codes", "SFT", "then tb"]
    assert stages("--loss", "tb", "--seeds", "7") == ["SASRec", "codes", "SFT", "then tb"]


def test_the_test_users_are_scored_once_after_the_state_is_chosen(dataset, monkeypatch):
    users = datasets.load(str(dataset))
    last = users.items[users.offsets[1:] - 1]
    scored = []

    def note(items, target):
        scored.append(torch.equal(target, last))
        return ranking_metrics(items, target)

    ranking_metrics = datasets.ranking_metrics
    monkeypatch.setattr(datasets, "ranking_metrics", note)
    g.main(command(dataset))
    # SASRec, SFT and TB: two validations, one of all users, the test.
    assert scored == [False, False, False, True] * 3


def test_seeds_end_in_mean_and_deviation(dataset, capsys):
    g.main(command(dataset, "--seeds", "1,2"))
    table = capsys.readouterr().out.split("\ntest, 2 seeds")[1]
    paths = dataset.parent.glob("runs/World/SFT-*/result.pt")
    values = [torch.load(path)["test"]["R@10"] for path in paths]
    mean, spread = re.search("\n(SFT .*)\n(  ± std .*)", table).groups()
    assert mean.split()[2] == f"{np.mean(values):.4f}"
    assert spread.split()[3] == f"{np.std(values, ddof=1):.4f}"


def test_other_code_is_told(dataset, capsys, monkeypatch):
    g.main(command(dataset))
    monkeypatch.setattr(g, "CODE", "another")
    capsys.readouterr()
    g.main(command(dataset))
    assert capsys.readouterr().out.count("other code than today's") == 4


def test_settings_reach_what_they_name(dataset, capsys, tmp_path):
    codes = tmp_path / "codes.json"
    codes.write_text(
        json.dumps({str(i): [f"<a_{i % 7}>", f"<b_{i % 7 + i // 7}>"] for i in range(40)})
    )
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(40, 6)))
    for flags in (
        ["--codes", str(codes), "--softmax", "all", "--z", "global"],
        ["--item-vectors", str(tmp_path / "vectors.npy"), "--sft-epochs", "0"],
        ["--backbone", "letter", "--no-confidence", "--reward", "cs"],
        ["--loss", "db", "--k", "0", "--beta", "0"],
    ):
        assert g.main(command(dataset, *flags)) == 0
    out = capsys.readouterr().out
    assert "a level has 7, 11" in out and "then db is" in out


def test_a_table_of_clicks_runs_and_recommends_by_its_own_ids(tmp_path, capsys):
    chance = random.Random(0)
    rows = ["user,item,timestamp"]
    for user in range(40):
        start = chance.randrange(30)
        rows += [f"u{user},B{(start + 2 * i) % 30:03},{1000 + i}" for i in range(6)]
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(rows))
    assert (
        g.main(["--dataset", str(path), "--runs-dir", str(tmp_path / "runs"), *TINY]) == 0
    )
    assert "their vectors are SASRec's own" in capsys.readouterr().out
    folder = next(tmp_path.glob("runs/clicks/then-tb-*"))
    found = g.recommend(folder, np.array(["B004", "B006"]), 5)
    assert len(set(found)) == 5 and all(item.startswith("B") for item in found)
    with pytest.raises(DataError, match="a history needs items"):
        g.recommend(folder, ["B999"])


@pytest.mark.parametrize("precision, alike", [("fp32", 1.0), ("bf16", 0.9)])
def test_recommend_gives_the_lists_that_were_scored(dataset, precision, alike):
    assert g.main(command(dataset, "--precision", precision)) == 0
    data = datasets.load(str(dataset))
    folder = next(dataset.parent.glob("runs/World/then-tb-*"))
    scored = torch.load(folder / "result.pt")["top"][:, :10].tolist()
    shared = 0
    for user in range(data.n_users):
        history = data.items[data.offsets[user] : data.offsets[user + 1] - 1].tolist()
        shared += len(set(g.recommend(folder, history)) & set(scored[user]))
    assert shared >= alike * 10 * data.n_users


# --------------------------------------------- interrupts, processes, rough places


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(dataset):
    flags = ["--loss", "ipa", "--sft-epochs", "20", "--evaluations", "10"]
    shell(dataset, *flags).communicate()
    expected = kept(dataset)
    shutil.rmtree(dataset.parent / "runs")
    told = ""
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = shell(dataset, *flags)
        for line in process.stdout:  # up to the first validation
            told += line
            if re.search("N@10", line):
                break
        process.send_signal(number)
        process.communicate()
    out, error = shell(dataset, *flags).communicate()
    assert "goes on after step" in told + out, error
    found = kept(dataset)
    assert all(
        same(found[name], expected[name]) for name in ("SASRec", "SFT", "then-ipa")
    )


def test_a_stopped_training_goes_on_after_its_step(tmp_path, monkeypatch):
    signals = [signal.SIGTERM]

    def distance(weight, history, target, *_):
        return (weight - target).square()

    def stop_at_13(weight, history, target, progress, *_):
        if round(progress.item() * 40) == 12 and signals:
            os.kill(os.getpid(), signals.pop())
        return distance(weight, history, target)

    def rank_of(weight):
        return int(9 * (2 - weight) / 2)  # the nearer to the target, 2, the better

    with pytest.raises(KeyboardInterrupt, match="stopped after step 13 of 40"):
        train_line(tmp_path / "a", stop_at_13, rank_of)
    straight = train_line(tmp_path / "b", distance, rank_of)
    monkeypatch.setattr(g, "CODE", "another")
    assert straight == train_line(tmp_path / "a", stop_at_13, rank_of) > 1
    for name in "ab":
        notes = (tmp_path / name / "metrics.jsonl").read_text()
        assert re.findall(r'"step": (\d+)', notes) == "10 20 30 40".split()


def test_a_closed_pipe_keeps_a_snapshot(dataset):
    process = shell(dataset, "--sft-epochs", "200", "--evaluations", "50")
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1
    assert "the same command goes on from there" in error


def test_two_processes_give_the_losses_of_one(dataset):
    port = str(random.randrange(20000, 60000))
    flags = ["--dropout", "0", "--loss", "sft", "--seeds", "5"]
    shell(dataset, *flags).communicate()
    one = kept(dataset)["then-sft"]
    shutil.rmtree(dataset.parent / "runs")
    both = [
        shell(
            dataset,
            *flags,
            RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[1][0] == ""
    for name, value in kept(dataset)["then-sft"]["state"].items():
        torch.testing.assert_close(value, one["state"][name], atol=2e-3, rtol=1e-2)


def test_a_damaged_file_and_a_bad_place_are_one_sentence(dataset, capsys):
    assert g.main(command(dataset)) == 0
    for pattern in ("SFT-*/result.pt", "codes-*/result.pt"):
        path = next(dataset.parent.glob(f"runs/World/{pattern}"))
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert g.main(command(dataset)) == 1
        assert f"{path} is damaged; remove it" in capsys.readouterr().err
        path.write_bytes(content)
    (dataset.parent / "file").write_text("")
    assert g.main([*command(dataset), "--runs-dir", str(dataset.parent / "file")]) == 1
    assert "--runs-dir" in capsys.readouterr().err


@pytest.mark.parametrize("n", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_rough_worlds_train_or_are_refused_in_one_sentence(tmp_path, capsys, n):
    chance = random.Random(n)
    for case in range(n):
        n_items = chance.choice([1, 20, 25, 60])
        folder = tmp_path / f"Rough{case}"
        folder.mkdir()
        sequences = {
            str(u): [
                chance.randrange(n_items) for _ in range(chance.choice([1, 3, 4, 30]))
            ]
            for u in range(chance.choice([1, 7, 40]))
        }
        title = chance.choice(["same", "thing {} of {}", "", "商品{}红色"])
        items = {str(i): {"title": title.format(i, i % 3)} for i in range(n_items)}
        (folder / f"Rough{case}.inter.json").write_text(json.dumps(sequences))
        (folder / f"Rough{case}.item.json").write_text(json.dumps(items))
        flags = [
            "--loss",
            chance.choice(["tb", "db", "ipa", "grpo", "sdpo"]),
            "--seeds",
            str(case),
        ]
        code = g.main([*command(tmp_path / "World", *flags), "--dataset", str(folder)])
        shown = capsys.readouterr()
        assert (
            code == 0 and "\ntest " in shown.out or shown.err.startswith("error: ")
        ), sequences


# --------------------------------------------------------------------- the benchmark

TIGER = dict(heads=6, d_kv=64, d_ff=1024, layers=4)
# Of Beauty's training pairs, how many have histories of 1, 2 .. 20 items.
BEAUTY_LENGTHS = numbers(
    "22363 22363 15201 10980 8300 6489 5123 4242 3547 2989 2550 2189 "
    "1927 1720 1507 1366 1248 1136 1019 15154"
)[0]


def pairs_like_beauty(n_items, device, n=60_000):
    """Random items in histories as long as those of Beauty's training pairs."""
    share = torch.tensor(BEAUTY_LENGTHS).double()
    lengths = 1 + torch.multinomial(share, n, replacement=True)
    end = torch.randint(20, 200_000, (n,))
    items = torch.cat([torch.randint(n_items, (200_000,)), torch.tensor([n_items])])
    return datasets.Examples(items.to(device), end - lengths, end)


def median_seconds(*works):
    """The median time of each of several works, done in turns, after one turn to warm up."""
    times = []
    for _ in range(6):
        times.append([])
        for work in works:
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return np.median(times[1:], axis=0)


def steps_of(loss_of, model, cfg, pairs, batches, graph=True):
    """All that `train` does for some batches, as a function."""
    step = g.Step(cfg, model, lambda *inputs: loss_of(*inputs[:2]))
    optimiser = g.relative_adamw(model, 1e-3)
    progress = torch.tensor(0.5, device=cfg.device)
    if graph and cfg.device == "cuda":
        inputs = (progress, *pairs.batch(batches[0]))
        torch.cuda.make_graphed_callables(step, inputs, allow_unused_input=True)

    def work():
        for rows in batches:
            loss, _ = step(progress, *pairs.batch(rows))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return work


def hugging_face(cfg, trie, pairs, batches):
    """Steps of Hugging Face's T5 at TIGER's size, in float32, as LETTER trains it."""
    import transformers

    size = dict(d_model=128, num_heads=6, d_kv=64, d_ff=1024, num_layers=4)
    config = transformers.T5Config(vocab_size=1025, decoder_start_token_id=0, **size)
    model = transformers.T5ForConditionalGeneration(config).to(cfg.device)

    def loss_of(history, clicked):
        tokens = trie.tokens[history].flatten(1)
        mask = (tokens > 0).long()
        output = model(tokens, attention_mask=mask, labels=trie.tokens[clicked])
        return output.loss[None], {}

    cfg = dataclasses.replace(cfg, precision="fp32")
    return steps_of(loss_of, model, cfg, pairs, batches, graph=False)


def benchmark(n_items):
    """Print what the GPU or CPU does in a second: pairs in steps of SFT, TB and SASRec,
    users of the search, and, of its peak of products, the share that SFT reaches."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cfg = g.Config()
    pairs = pairs_like_beauty(n_items, cfg.device)
    codes = torch.randint(256, (n_items, 3))
    trie = g.Trie(datasets.unique_paths(codes).to(cfg.device), 3)
    teacher = g.SASRec(n_items).to(cfg.device)
    # Of a pass of batches, which hold like lengths each, some of all lengths.
    batches = list(itertools.islice(datasets.batches(pairs, 256, 0), 234))
    batches.sort(key=lambda rows: pairs.length[rows].max())
    batches = batches[13::21]
    n = 256 * len(batches)

    def sasrec_loss(history, target):
        return teacher.loss(history, target), {}

    square = torch.randn(4096, 4096, device=cfg.device).to(g.TYPES[cfg.precision])
    steps = steps_of(sasrec_loss, teacher, cfg, pairs._replace(every=True), batches)
    sasrec, product = median_seconds(steps, lambda: square @ square)
    teacher.eval().requires_grad_(False)
    peak = 2 * 4096**3 / product  # in flops a second
    rows = ["|SFT pairs/s|TB pairs/s|TB step / SFT's|users/s|share of peak".split("|")]
    for name, size in (("default size", {}), ("TIGER's size", TIGER)):
        policy = g.generator(dataclasses.replace(cfg, **size), trie)
        sft_loss = partial(g.sft_loss, policy, trie)
        tb_loss = partial(g.gflowgr_loss, policy, teacher, trie, beta=0.0)
        found_by = lambda history: g.beam_search(policy, trie, history)[0]
        with FlopCounterMode(display=False) as counter, g.mixed_precision(cfg):
            for batch in batches:
                sft_loss(*pairs.batch(batch))[0].sum().backward()
        works = [
            steps_of(sft_loss, policy, cfg, pairs, batches),
            steps_of(tb_loss, policy, cfg, pairs, batches),
            lambda: g.top_items(cfg, policy, found_by, pairs, torch.arange(512)),
        ]
        if size and importlib.util.find_spec("transformers"):
            mixed = list(torch.randint(len(pairs.end), (3, 256)))
            works.append(hugging_face(cfg, trie, pairs, mixed))
        sft, tb, users, *standard = median_seconds(*works)
        share = counter.get_total_flops() / sft / peak
        figures = (
            f"{n / sft:,.0f}|{n / tb:,.0f}|{tb / sft:.2f}|{512 / users:,.0f}|{share:.0%}"
        )
        rows.append(f"{name}|{figures}".split("|"))
    import resource  # which Windows has not

    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{n_items:,} items, {cfg.device}, {cfg.precision}, {threads} threads, "
        f"peak {peak / 1e9:,.0f} Gflop/s"
    )
    print(datasets.aligned(rows))
    print(f"SASRec: {n / sasrec:,.0f} windows/s; memory {memory:.1f} GiB")
    for took in standard:
        print(f"Hugging Face's T5, TIGER's size: {3 * 256 / took:,.0f} pairs/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--benchmark", action="store_true", required=True)
    parser.add_argument("--items", type=int, default=12101)
    benchmark(parser.parse_args().items)

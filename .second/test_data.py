"""The proof of data.py, in its order. Each test compares with loops written by hand,
with a closed form, or with numbers that can be worked out on paper."""
import http.server
import itertools
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import data as datasets
from data import DataError

N = 300     # items of a world, and so the padding
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
    torch.save(Path("y"), path)             # an object: to read it would run code
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


@pytest.mark.parametrize("replies, words", [
    ([BUSY] * 3, "503"),
    ([WRONG], "is not the file that it should be"),
])
def test_a_failed_download_is_named_and_leaves_nothing(get, tmp_path, replies, words):
    message = refusal(get, *replies)
    assert words in message and "/Tiny/Tiny.inter.json" in message
    assert files_under(tmp_path) == []


def test_no_network_names_the_way_out(get, tmp_path):
    nobody = "http://127.0.0.1:9"
    message = refusal(datasets.download, "tiny", tmp_path, ("inter",), nobody)
    assert "--dataset toy, which needs no network" in message


# --------------------------------------------------------------------------------- read

@pytest.mark.parametrize("kind, content, words", cases("""
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
"""))
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


ROWS = '''1,c\u2028c,3
2,"a,a",1
1,"a,a",1
1,"b
b",2
1,"a,a",3
2,"b
b",1
2,c\u2028c,0'''


@pytest.mark.parametrize("suffix, encoding, header", cases("""
    .csv   | utf-8     | user,item,timestamp
    .csv   | utf-8-sig | User_ID,"Item",Timestamp
    .csv   | utf-16    |
    .csv   | utf-8     |
    .tsv   | utf-8     | user,item,timestamp
    .inter | utf-8     | user_id:token,item_id:token,timestamp:float
"""))
def test_a_table_is_sorted_by_time_in_every_form(tmp_path, suffix, encoding, header):
    path = tmp_path / f"clicks{suffix}"
    text = f"{header}\n{ROWS}"
    if suffix != ".csv":
        text = text.replace("a,a", "a;a").replace(",", "\t").replace("a;a", "a,a")
    path.write_text(text, encoding)
    data = datasets.load(str(path))
    assert data.ids == ["a,a", "b\nb", "c\u2028c"]
    assert data.offsets.tolist() == [0, 4, 7]
    assert data.items.tolist() == [0, 1, 2, 0, 2, 0, 1]     # equal times as in the file


@pytest.mark.parametrize("row", "u,a,monday u,a,nan u,a,-inf u,a ,a,5 u,,5".split())
def test_a_bad_row_is_named_with_its_file_and_line(tmp_path, row):
    path = tmp_path / "clicks.csv"
    path.write_text(f'user,item,timestamp\n"u\n1",a,1\n{row}\nu,a,7\n')
    message = refusal(datasets.load, str(path))
    assert f"{path}, line 4: needed are a user, an item and a number" in message
    assert row.split(",")[-1] in message


@pytest.mark.parametrize("content, words", [
    (b"", "is empty"),
    (b"u,a,1\nu\xe91,a,2", "is not a table"),
])
def test_a_file_that_is_no_table_is_named(tmp_path, content, words):
    path = tmp_path / "clicks.csv"
    path.write_bytes(content)
    assert f"{path} {words}" in refusal(datasets.load, str(path))


def test_texts_beside_a_table_are_found_by_item_id(tmp_path):
    (tmp_path / "x.csv").write_text("""timestamp,stars,item_id,user_id
        1,5,30,u
        1,5,4,u
        1,5,30,u
        1,5,100,u""")
    (tmp_path / "x.items.csv").write_text("""title,item_id,description
"shoe, red",100,of wood
hat,5,""")
    data = datasets.load(str(tmp_path / "x.csv"))
    assert data.ids == ["100", "30", "4", "5"]
    assert data.items.tolist() == [1, 2, 1, 0]
    assert data.titles == ["shoe, red", "30", "4", "hat"]
    assert data.texts == ["shoe, red of wood", "", "", "hat"]


def test_the_toy_world_follows_the_tastes_it_knows():
    data = datasets.toy(n_users=400, n_items=200)
    assert data.liked.sum(1).tolist() == [10] * 400         # 5 %
    clicked = data.liked[data.user, data.items].double()
    assert clicked.mean() > 0.25
    pairs = torch.stack([data.user, data.items])
    assert pairs.unique(dim=1).shape == pairs.shape         # none twice
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
            row = [*padded(sequence[max(0, i - 4):i], 4), sequence[i]]
            expected[min(follow, 2)].append(row)

    parts = datasets.split(world(sequences), max_history=4)
    for part, pairs in zip(("test", "valid", "train"), expected):
        rows = torch.arange(len(pairs))
        history, target = parts[part].batch(rows)
        assert torch.column_stack([history, target]).tolist() == pairs
        assert torch.equal(parts[part].target(rows), target)


def test_windows_hold_every_training_target_once_after_what_came_before():
    sequences = []
    expected = []
    for user in range(9):
        n = user + 3
        sequence = list(range(20 * user, 20 * user + n))    # each item stands once
        sequences.append(sequence)
        for end in reversed(range(n - 3, 0, -4)):           # from the last in training
            start = max(0, end - 4)
            following = sequence[start + 1:end + 1]
            expected.append([padded(sequence[start:end], 5), padded(following, 5)])

    windows = datasets.windows(world(sequences), 4)
    rows = torch.arange(len(windows.end))
    found = torch.stack(windows.batch(rows, width=5), 1)
    assert found.tolist() == expected


@pytest.mark.parametrize("alike", [False, True])
def test_batches_are_full_and_hold_each_row_once_a_pass(alike):
    lengths = torch.arange(23) % 6
    stream = datasets.batches(lengths, 5, 0, alike)
    batches = torch.stack(list(itertools.islice(stream, 46)))
    for passes in range(1, 11):
        rows = batches[:23 * passes // 5]
        count = torch.bincount(rows.flatten(), minlength=23)
        assert passes - 1 <= count.min() and count.max() == passes


def test_alike_batches_hold_neighbours_in_length_in_random_order():
    lengths = torch.randperm(40)
    stream = datasets.batches(lengths, 5, 0, alike=True)
    found = [sorted(lengths[rows].tolist()) for rows in itertools.islice(stream, 8)]
    assert sorted(found) == torch.arange(40).view(8, 5).tolist()
    assert found != sorted(found)


def test_a_pool_must_hold_enough_unclicked_items():
    data = world(numbers("0 1 2 3 4 5"))
    datasets.check_size(data, 20, 5, 12)                    # 12 - 6 - 1
    datasets.check_size(data, 3, 8, 12)                     # 12 - 3 - 1
    assert "a pool of 12" in refusal(datasets.check_size, data, 20, 6, 12)


# --------------------------------------------------------------- item vectors and codes

@pytest.mark.parametrize("text, words", cases("""
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
"""))
def test_words_of_every_script(text, words):
    assert datasets.words(text) == words.split()


@pytest.mark.parametrize("one, other", cases("""
    красная обувь   | обувь детская
    शाम की चाय       | हरी चाय
    กาแฟเย็น          | ชาเย็น
    红手机壳        | 手机
    赤いくつ        | 青いくつ
    빨간 신발       | 신발 가게
    ＲＥＤ          | red hat
    une\u0301 bal   | un\u00e9
"""))
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
    count = torch.tensor([[text.split().count(word) for word in columns]
                          for text in found])
    value = torch.where(count > 0, 1 + count.double().log(), 0)
    value *= (len(table) / (count > 0).sum(0)).log()
    matrix = torch.nn.functional.normalize(value)

    left, scale, _ = torch.linalg.svd(matrix, full_matrices=False)
    best = left[:, :dim] * scale[:dim]
    best *= (len(table) * dim) ** 0.5 / best.norm()         # to mean square 1
    vectors = datasets.text_vectors(texts, dim).double()
    assert vectors.shape == (len(table), dim)
    torch.testing.assert_close(vectors @ vectors.T, best @ best.T, atol=1e-4, rtol=0)
    assert "the words of 2 of 9 items" in capsys.readouterr().out


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
    assert not datasets.principal_vectors(x, 3)[:, 2:].any()            # filled up


@pytest.mark.parametrize("scale", [1, 1e-200, 1e200])
def test_own_vectors_are_the_same_in_every_unit(tmp_path, scale):
    array = np.array([[3, 4], [0, 5]])                      # of mean square 12.5
    np.save(tmp_path / "v.npy", array * scale)
    found = datasets.read_vectors(tmp_path / "v.npy", 2)
    torch.testing.assert_close(found, torch.from_numpy(array / 12.5 ** 0.5).float())


@pytest.mark.parametrize("array, words", cases("""
    [[0, 0], [0, 0]]         | an array of shape (2, 2); needed are numbers, one row for
    [0, 0, 0]                | an array of shape (3,); needed are numbers, one row for
    [[], [], []]             | an array of shape (3, 0); needed are numbers, one row for
    [[1], [NaN], [Infinity]] | row 1 is not finite
    [["a"], ["b"], ["c"]]    | is not a .npy file of numbers
    [{}, {}, {}]             | Object arrays cannot be loaded
"""))
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
    content = {item: [f"<a_{a}>", f"<b_{b}>", f"<c_{c}>"]
               for item, (a, b, c) in enumerate(codes.tolist())}
    path = tmp_path / "Beauty" / "Beauty.index.json"
    datasets.write_atomically(path, json.dumps(content).encode())
    for name in (path, "letter"):
        found = datasets.ready_codes(name, "beauty", tmp_path, 40)
        assert torch.equal(found, codes)
    assert "for beauty and yelp, not toy" in refusal(
        datasets.ready_codes, "letter", "toy", tmp_path, 40)


@pytest.mark.parametrize("content, words", cases("""
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
"""))
def test_malformed_codes_are_named(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    assert words in refusal(datasets.read_codes, tmp_path / "x.json", 2)


@pytest.mark.parametrize("levels, codes, why", cases("""
    2 | 0 0 0, 0 0 1, 1 0 0, 1 1 0 | TIGER's way
    2 | 0 0 9, 0 0 4, 1 0 4, 1 1 9 | the same in other numbers
    2 | 0 1 5, 0 2 5, 0 3 5        | no twins: it is a constant
    3 | 0 0 0, 0 0 1, 1 0 2, 1 1 3 | it has more codes than there are twins
    3 | 0 0 0, 0 0 0, 1 0 0, 1 1 0 | it does not tell twins apart
    1 | 0, 1, 2                    | there is no other level
"""))
def test_a_last_level_that_only_counts_twins_has_no_meaning(levels, codes, why):
    found = datasets.semantic_levels(torch.tensor(numbers(codes)))
    assert found == int(levels), why


def test_code_figures_by_hand():
    codes = torch.tensor(numbers("0 256, 0 259, 2 257, 2 257"))
    line = datasets.code_figures(codes)
    assert line.endswith("a level has 2, 3; collision rate 0.250")
    line = datasets.code_figures(codes, size=16)
    assert line.endswith("usage 12%, 19%; collision rate 0.250")
    collapsed = datasets.code_figures(0 * codes, size=16)
    assert "usage 6%, 6%; collision rate 0.750\nnote: most items share" in collapsed


# ------------------------------------------------------------------------------ metrics

def test_top_is_sorted_and_filled_up():
    scores = torch.tensor(numbers("1 9 5"))
    assert datasets.top(scores, 2).tolist() == [[1, 2]]
    assert datasets.top(scores, 4).tolist() == [[1, 2, 0, 3]]


def test_ranking_metrics_by_hand():
    target = torch.tensor([0, 4, 9, 10, 99])                # ranks 1, 5, 10, 11, none
    found = datasets.ranking_metrics(torch.arange(20).expand(5, -1), target)
    assert list(found) == "R@1 R@5 R@10 R@20 N@5 N@10 N@20".split()
    gain = np.cumsum(1 / np.log2([2, 6, 11, 12])) / 5
    assert list(found.values()) == pytest.approx([0.2, 0.4, 0.6, 0.8, *gain[1:]])


def test_popular_items_are_counted_in_training_alone():
    data = world(numbers("3 3 1 0 0, 3 1 2 2"))
    assert datasets.popularity(data)[:5].tolist() == [0, 2, 0, 3, 0]
    assert datasets.popular(data)["top"][:, :2].tolist() == [[3, 1], [3, 1]]


def test_liked_unseen_by_hand():
    liked = torch.zeros(2, N, dtype=torch.bool)
    liked[:, [0, 1, 2, 12]] = True
    data = world(numbers("0 5 6 7, 9 0 2 9"), liked)
    top = torch.arange(20).repeat(2, 1)                     # 12 is too far down
    top[:, 3] = N                                           # there is none
    assert datasets.liked_unseen(top, data) == 1.5          # 1 and 2; 1
    assert data.liked.sum() == 8                            # the world is as it was


def test_diversity_by_hand():
    data = world(numbers("3 3 3 2 2 1 4 4, 0 9 5 5"))       # most popular: 3, 2
    top = torch.tensor(numbers("3 3 3 3 3 3 3 3 3 3, 2 2 2 2 2 300 300 300 300 300"))
    expected = {"coverage": 2 / 300,                        # shares of 2/3 and 1/3
                "KL": math.log(100) + 2 / 3 * math.log(2),
                "std": ((200 ** 2 + 100 ** 2) / 300 - 1) ** 0.5,
                "rank": 4 / 3}
    assert datasets.diversity(top, data) == pytest.approx(expected)


# ------------------------------------------------------------------------------- tables

def result(hits, recall=0.05):
    """A row whose users' test item, 7, is found at rank 10, a hit, or at rank 11."""
    top = torch.zeros(len(hits), 20, dtype=torch.int)
    top[torch.arange(len(hits)), 10 - hits.long()] = 7
    test = {"R@5": 0.04, "R@10": recall, "N@5": 0.02, "N@10": 0.03, "liked": 0.4}
    return {"test": test, "top": top, "valid": {"N@10": 0.036}, "seconds": 12345.6}


def test_paired_difference_by_hand():
    hits = torch.tensor(numbers("0 0 1 0, 1 0 1 1, 0 0 0 1"))
    base, one, two = map(result, hits)
    found = [({"A": row, "B": base}, torch.full((4,), 7)) for row in (one, two)]
    # 1, 0, 0, 1 and 0, 0, -1, 1 have the means 0.5, 0, -0.5, 1.
    assert datasets.paired_difference(found, "A", "B") == pytest.approx(
        (0.25, (5 / 12) ** 0.5 / 2))


def one_seed(recall):
    """The rows of a seed of 2,000 users, and their test items."""
    user = torch.arange(2000)
    results = {"popular": result(user < 9), "SASRec": result(user < 120),
               "SFT": result(user < 100), "then sft": result(user >= 1900),
               "then sprec": result(user < 200, recall), "then grpo": result(user < 50)}
    del results["popular"]["valid"], results["popular"]["seconds"]
    return results, torch.full((2000,), 7)


@pytest.mark.parametrize("recalls, shown", [
    ([0.0612], ["0.0612"]),
    ([0.0612, 0.0634, 0.0626], ["0.0624", "0.0011"]),       # mean, standard deviation
])
def test_the_table_holds_means_spreads_and_differences_in_100_columns(recalls, shown):
    table = datasets.results_table([one_seed(recall) for recall in recalls])
    lines = table.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split()[-1] == "0.4000"                 # nothing after `liked`
    end = lines[0].index("R@10") + 4
    row = [line[:10] for line in lines].index("then sprec")
    assert [line[end - 6:end] for line in lines[row:row + len(shown)]] == shown
    assert f"+0.0500 ± {(0.05 * 0.95 / 1999) ** 0.5:.4f}   12,346" in lines[row]


def test_the_verdict_counts_two_standard_errors():
    lines = datasets.results_table([one_seed(0.06)]).splitlines()[-3:]
    assert lines[0] == "then sft is level with SFT (+0.0000 ± 0.0071) in R@10"
    assert lines[1].startswith("then sprec is above SFT (+0.0500 ± 0.0049) and above")
    assert lines[2].startswith("then grpo is below SFT (-0.0250 ± 0.0035) and below")


def test_balance_is_the_residual_of_trajectory_balance():
    before = {"log Z": torch.tensor([1.5]), "exact log Z": torch.tensor([1.25]),
              "R": torch.full((1, 2), math.e), "log p": torch.tensor([[2.5, -4.5]])}
    now = {**before, "log p": torch.tensor([[-0.5, -0.5]])}     # log R - log Z
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

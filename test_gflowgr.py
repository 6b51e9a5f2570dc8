"""The proof of gflowgr.py and data.py. Every formula meets something independent of it: brute force, a closed
form, or golden values of the standard implementation.

    python -m pytest -q test_gflowgr.py
    python test_gflowgr.py --benchmark              pairs/s, users/s and the share of the machine's peak
    python test_gflowgr.py --scaling                time and memory of each stage, up to a million items
    python test_gflowgr.py --optimum beauty         what a generator at the optimum of TB would recommend
"""
import concurrent.futures
import contextlib
import copy
import errno
import functools
import hashlib
import http.server
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter

import data as datasets
import gflowgr as g
from data import DataError


HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small_world(n_users=60, n_items=50, seed=1):
    return datasets.toy(seed, n_users, n_items, n_categories=5, n_brands=4)


def small_catalogue(n_items=30, levels=3, width=4, seed=0):
    """Distinct random paths of codes."""
    every = torch.tensor(list(itertools.product(range(width), repeat=levels)))
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return g.Catalogue.of(every[order[:n_items]], levels)


def small_generator(catalogue, **size):
    model = g.T5(catalogue.codes.shape[1], int(catalogue.codes.max()) + 1,
                 **{**dict(d_model=16, heads=2, d_kv=8, d_ff=32, layers=2, dropout=0.0), **size})
    torch.nn.init.normal_(model.flow.weight)
    return model.eval()


def log_probs(model, catalogue, history, items):
    """log_pf and log_flow of items after histories."""
    return g.path_log_probs(model, catalogue, catalogue.read(model, history), items)[:2]


# --------------------------------------------------------------------------------------------- data: files

class Server(http.server.BaseHTTPRequestHandler):
    """Answers each request with the next of `replies`: (status, body, announced length)."""

    def do_GET(self):
        self.server.paths.append(self.path)
        status, body, length = self.server.replies.pop(0)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body.decode())
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serve(*replies):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.replies = [reply if len(reply) == 3 else (*reply, len(reply[1])) for reply in replies]
    server.paths = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


INTER, ITEM = b'{"0": [0, 1, 2, 1], "1": [2, 1, 0]}', json.dumps(
    {str(i): {"title": f"thing {i}", "description": "red" if i else "blue"} for i in range(3)}).encode()


@pytest.fixture
def tiny(monkeypatch):
    """A built-in dataset of two small files."""
    monkeypatch.setitem(datasets.DATASETS, "tiny", ("Tiny", {"inter": datasets.git_blob_id(INTER),
                                                             "item": datasets.git_blob_id(ITEM)}))


def files_under(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_blob_id_is_gits():
    assert datasets.git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # what git says of it
    assert datasets.git_blob_id(b"ab") == hashlib.sha1(b"blob 2\x00ab").hexdigest()


def test_download_keeps_verified_files_and_asks_once(tiny, tmp_path):
    with serve((200, INTER), (200, ITEM)) as (server, url):
        folder = datasets.download("tiny", tmp_path, url, ())
        datasets.download("tiny", tmp_path, url, ())
    assert server.paths == ["/Tiny/Tiny.inter.json", "/Tiny/Tiny.item.json"]
    assert files_under(tmp_path) == ["Tiny.inter.json", "Tiny.item.json"]
    data = datasets.read_folder(folder)
    assert (data.n_users, data.n_items, data.items.tolist()) == (2, 3, [0, 1, 2, 1, 2, 1, 0])


def test_download_tries_again_after_503_and_a_cut_connection(tiny, tmp_path):
    with serve((503, b""), (200, INTER[:9], len(INTER)), (200, INTER), (200, ITEM)) as (server, url):
        datasets.download("tiny", tmp_path, url, (0.0, 0.0))
    assert len(server.paths) == 4 and files_under(tmp_path) == ["Tiny.inter.json", "Tiny.item.json"]


@pytest.mark.parametrize("replies, requests, words", [
    ([(404, b"")], 1, "404"),
    ([(503, b"")] * 3, 3, "503"),
    ([(200, INTER[:9], len(INTER))] * 3, 3, "IncompleteRead"),
    ([(200, b"{}")], 1, "not the expected file"),
    ([(200, INTER, "abc")], 1, "invalid literal for int"),
    ([(302, b"http://[::1")], 1, "Invalid IPv6 URL"),
])
def test_download_that_fails_leaves_nothing(tiny, tmp_path, replies, requests, words):
    with serve(*replies) as (server, url), pytest.raises(DataError) as error:
        datasets.download("tiny", tmp_path, url, (0.0, 0.0))
    assert words in str(error.value) and "Tiny.inter.json" in str(error.value)
    assert len(server.paths) == requests and files_under(tmp_path) == []


def test_redirects_are_followed_but_never_away_from_https(tiny, tmp_path):
    with serve((302, b"/elsewhere"), (200, INTER), (200, ITEM)) as (server, url):
        datasets.download("tiny", tmp_path, url, ())
    assert server.paths[1] == "/elsewhere" and len(files_under(tmp_path)) == 2
    handler = datasets.SafeRedirects()
    request = urllib.request.Request("https://a/x")
    assert handler.redirect_request(request, None, 302, "", {}, "https://b/x").full_url == "https://b/x"
    with pytest.raises(urllib.error.HTTPError, match="away from HTTPS"):
        handler.redirect_request(request, None, 302, "", {}, "http://b/x")
    assert all(url.startswith("https://") for url in (datasets.BASE_URL,))


def test_a_server_that_sends_too_much_or_too_slowly_is_cut_off(monkeypatch):
    with serve((200, b"x" * 5000), (200, b"x" * 5000, 10 ** 12), (200, b"x")) as (server, url):
        for _ in range(2):
            with pytest.raises(OSError, match="more than the 4,000 bytes"):
                datasets.fetch(url, most=4000)
        with pytest.raises(OSError, match="not all there"):
            datasets.fetch(url, patience=-1.0)
    with serve((200, b"x")) as (server, url), pytest.raises(OSError, match="not all there"):
        monkeypatch.setattr(datasets, "fetch", functools.partial(datasets.fetch, patience=-1.0))
        datasets.fetch_patiently(url, (0.0, 0.0))
    assert len(server.paths) == 1


def test_the_proxy_of_the_environment_is_asked(monkeypatch):
    with serve((200, b"by proxy")) as (server, url):
        monkeypatch.setenv("http_proxy", url)
        monkeypatch.setenv("no_proxy", "")
        assert datasets.fetch("http://somewhere.invalid/file") == b"by proxy"
    assert server.paths == ["http://somewhere.invalid/file"]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_fetched(tiny, tmp_path):
    (tmp_path / "Tiny").write_text("a file")
    with serve() as (server, url), pytest.raises(OSError):
        datasets.download("tiny", tmp_path, url, ())
    assert server.paths == []


def test_no_network_names_the_way_out(tiny, tmp_path):
    with pytest.raises(DataError, match="put the file by hand at .*Tiny.inter.json.*--dataset toy"):
        datasets.download("tiny", tmp_path, "http://127.0.0.1:9", ())


def test_published_codes_are_fetched_once_and_only_where_they_are_known(tmp_path, monkeypatch):
    index = datasets.format_codes(torch.tensor([[0, 1], [0, 0], [1, 0]])).encode()
    monkeypatch.setitem(datasets.DATASETS, "tiny", ("Tiny", {"index": datasets.git_blob_id(index)}))
    with serve((200, index)) as (server, url):
        monkeypatch.setattr(datasets.download, "__defaults__", (url, (), ("inter", "item")))
        paths = [datasets.published_codes("tiny", tmp_path) for _ in range(2)]
    assert server.paths == ["/Tiny/Tiny.index.json"] and paths == [tmp_path / "Tiny" / "Tiny.index.json"] * 2
    assert datasets.read_codes(paths[0], 3).tolist() == [[0, 1], [0, 0], [1, 0]]
    for dataset in ("toy", "instruments", str(tmp_path)):
        with pytest.raises(DataError, match="beauty and yelp and tiny, not for .* give the path"):
            datasets.published_codes(dataset, tmp_path)


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(datasets.os, "replace", full)
    with pytest.raises(OSError):
        datasets.write_atomically(tmp_path / "file", b"content")
    assert files_under(tmp_path) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    def meanwhile(_):
        monkeypatch.setattr(datasets.os, "fsync", lambda _: None)
        datasets.write_atomically(tmp_path / "file", b"other")      # by another process of the same number

    monkeypatch.setattr(datasets.os, "fsync", meanwhile)
    datasets.write_atomically(tmp_path / "file", b"content")
    assert files_under(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"content"


# ------------------------------------------------------------------------------------------- data: loading

@pytest.mark.parametrize("inter, item, words", [
    ("{", None, r"Own.inter.json is not valid JSON"),
    ("[]", None, r"Own.inter.json must hold a JSON object"),
    ("{}", None, r"Own.inter.json must hold a JSON object"),
    ('{"0": [0, 1, 2], "0": [0, 1, 2]}', None, r'Own.inter.json is not valid .*the key "0" stands twice'),
    ('{"0": [0, 1, 2], "7": [0, 1]}', None, r'Own.inter.json: user "7" has 2 interactions'),
    ('{"7": [0, 1, 3]}', None, r'Own.inter.json: user "7" has the item 3, which is not in the catalogue'),
    ('{"7": [0, 1, -1]}', None, r'user "7" has the item -1'),
    ('{"7": [0, 1, "2"]}', None, r'user "7" has the item "2"'),
    ('{"7": [0, 1, NaN]}', None, r'user "7" has the item NaN'),
    ('{"7": [0, true, 1]}', None, r'user "7" has the item true'),
    ('{"7": {"0": 1}}', None, r'user "7" must have a list'),
    (None, "\xff", r"Own.item.json is not valid JSON"),
    (None, '{"0": {"title": "a"}, "2": {"title": "b"}}', r'Own.item.json: item "1" has no entry'),
    (None, '{"0": {"title": 5}}', r'Own.item.json: item "0" must be'),
    (None, '{"0": "text"}', r'Own.item.json: item "0" must be'),
])
def test_malformed_files_are_named(tmp_path, inter, item, words):
    folder = tmp_path / "Own"
    folder.mkdir()
    (folder / "Own.inter.json").write_bytes(inter.encode() if inter else INTER)
    (folder / "Own.item.json").write_bytes(item.encode("latin-1") if item else ITEM)
    with pytest.raises(DataError, match=words):
        datasets.load(str(folder))


def test_missing_files_and_unknown_names(tmp_path):
    with pytest.raises(DataError, match="does not exist or is not a file"):
        datasets.load(str(tmp_path))
    with pytest.raises(DataError, match="unknown dataset 'beuty'.*beauty"):
        datasets.load("beuty")


def test_items_without_text_are_reported_and_kept(tmp_path, capsys):
    folder = tmp_path / "Own"
    folder.mkdir()
    (folder / "Own.inter.json").write_bytes(INTER)
    (folder / "Own.item.json").write_text('{"0": {"title": "a b"}, "1": {"title": " "}, "2": {"title": "a"}}')
    data = datasets.load(str(folder))
    assert '1 items have no text, the first is "1"' in capsys.readouterr().err
    assert datasets.text_vectors(data.texts, 4)[1].abs().sum() == 0


def test_toy_world_follows_the_tastes_it_knows():
    data, again, other = small_world(), small_world(), small_world(seed=2)
    assert torch.equal(data.items, again.items) and not torch.equal(data.items[:100], other.items[:100])
    user = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())
    assert data.offsets.diff().min() >= 5 and len(set(zip(user.tolist(), data.items.tolist()))) == len(user)
    share = data.liked.float().mean()      # clicks must hit liked items far more often than chance
    assert 0.04 <= share <= 0.07 and data.liked[user, data.items].float().mean() > 3 * share


def test_split_leaves_one_out_without_leakage():
    data = datasets.Data("x", [""] * 9, [""] * 9, torch.arange(8), torch.tensor([0, 5, 8]), None, "")
    parts = datasets.split(data, max_history=2)
    rows = {part: [(e.items[s:t].tolist(), int(e.items[t])) for s, t in zip(e.start, e.end)]
            for part, e in parts.items()}
    assert rows == {"train": [([0], 1), ([0, 1], 2)], "valid": [([1, 2], 3), ([5], 6)],
                    "test": [([2, 3], 4), ([5, 6], 7)]}
    history, target = parts["test"].batch(torch.tensor([1, 0]))
    assert history.tolist() == [[5, 6], [2, 3]] and target.tolist() == [7, 4]
    history, _ = parts["train"].batch(torch.tensor([0, 1]))
    assert history.tolist() == [[0, 9], [0, 1]]            # padded on the right with N
    assert datasets.popularity(data).tolist() == [1, 1, 1, 0, 0, 1, 0, 0, 0]


def test_every_training_pair_of_a_world_once():
    data = small_world()
    train = datasets.split(data, 4)["train"]
    expected = [(data.items[s:t - 2][max(0, i - 4):i].tolist(), int(data.items[s + i])) for s, t in
                zip(data.offsets[:-1].tolist(), data.offsets[1:].tolist()) for i in range(1, t - s - 2)]
    history, target = train.batch(torch.arange(len(train)))
    found = [([i for i in h if i < data.n_items], y) for h, y in zip(history.tolist(), target.tolist())]
    assert found == expected


def test_windows_hold_every_training_target_once_after_what_came_before_it():
    data = small_world()
    pairs = datasets.split(data, 4)["train"]
    windows, found = pairs.windows(4), []
    history, target = windows.batch(torch.arange(len(windows)))
    assert history.shape == target.shape == (len(windows), 4) and len(windows) < 0.5 * len(pairs)
    assert torch.equal(history < data.n_items, target < data.n_items)               # padded alike
    assert windows.targets().tolist() == (target < data.n_items).sum(1).tolist()
    for user, items, following in zip(windows.user.tolist(), history.tolist(), target.tolist()):
        n = sum(item < data.n_items for item in items)
        assert items[1:n] == following[:n - 1]
        found += [(user, following[i], items[i]) for i in range(n)]
    expected = [(user, int(pairs.items[end]), int(pairs.items[end - 1]))
                for user, end in zip(pairs.user.tolist(), pairs.end.tolist())]
    assert sorted(found) == sorted(expected)
    ends = {user: int(pairs.end[pairs.user == user].max()) for user in pairs.user.tolist()}
    assert all((ends[user] - end) % 4 == 0 for user, end in zip(windows.user.tolist(), windows.end.tolist()))


def test_text_vectors_are_the_best_low_rank_tfidf():
    texts = ["red shoe", "red shoe", "blue shoe small", "blue hat", "", "hat small hat"]
    words = ["blue", "hat", "red", "shoe", "small"]        # each of two items or more
    count = np.array([[text.split().count(word) for word in words] for text in texts], float)
    weight = np.where(count > 0, 1 + np.log(np.maximum(count, 1)), 0) * np.log(6 / (count > 0).sum(0))
    weight /= np.maximum(np.linalg.norm(weight, axis=1, keepdims=True), 1e-12)
    for dim in (2, 8):
        u, s, _ = np.linalg.svd(weight, full_matrices=False)
        gram = (u[:, :dim] * s[:dim]) @ (u[:, :dim] * s[:dim]).T
        vectors = datasets.text_vectors(texts, dim).double().numpy()
        assert vectors.shape == (6, dim) and np.isclose((vectors ** 2).mean(), 1)
        np.testing.assert_allclose(vectors @ vectors.T, gram * 6 * dim / np.trace(gram), atol=1e-4)
    assert datasets.text_vectors(["a", "b"], 3).abs().sum() == 0   # no word of two items


@pytest.mark.parametrize("array, words", [
    (np.zeros((3, 2)), None), (np.zeros((3, 0)), "one row"), (np.zeros((2, 2)), "one row"),
    (np.zeros(3), "one row"),
    (np.array([[1.0], [np.nan], [np.inf]]), "row 1 is not finite"), (np.array([["a"]] * 3), "one row")])
def test_own_item_vectors(tmp_path, array, words):
    np.save(tmp_path / "v.npy", array)
    if words is None:
        assert datasets.read_vectors(tmp_path / "v.npy", 3).shape == (3, 2)
    else:
        with pytest.raises(DataError, match=words):
            datasets.read_vectors(tmp_path / "v.npy", 3)


def test_unreadable_item_vectors(tmp_path):
    for content in (b"not numpy", b"PK\x03\x04" + bytes(100), b""):
        (tmp_path / "v.npy").write_bytes(content)
        with pytest.raises(DataError, match="is not a .npy file of numbers"):
            datasets.read_vectors(tmp_path / "v.npy", 3)


def test_item_vectors_have_the_same_bits_with_any_number_of_threads(tmp_path):
    found, threads = [], torch.get_num_threads()
    try:
        for i, n in itertools.product(range(6), (1, 2)):        # their hash is part of each key
            np.save(tmp_path / "v.npy", np.random.default_rng(i).normal(size=(2000, 64)))
            torch.set_num_threads(n)
            found.append(datasets.read_vectors(tmp_path / "v.npy", 2000))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, found[::2], found[1::2]))
    assert found[0].square().mean().item() == pytest.approx(1)


def test_item_vectors_that_memory_cannot_hold_are_called_so(monkeypatch, tmp_path, capsys):
    def no_memory(*_, **__):
        raise MemoryError("Unable to allocate 7 TiB")

    (tmp_path / "v.npy").touch()
    monkeypatch.setattr(np, "load", no_memory)
    assert datasets.guarded(lambda: datasets.read_vectors(tmp_path / "v.npy", 5)) == 1
    assert "not enough memory (Unable to allocate 7 TiB)" in capsys.readouterr().err


def test_item_vectors_of_any_scale_are_the_same(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(5, 3))
    found = []
    for scale in (1e-200, 1.0, 1e200):
        np.save(tmp_path / "v.npy", vectors * scale)
        found.append(datasets.read_vectors(tmp_path / "v.npy", 5))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    for kind in ("f2", "f4", "i1", "g"):
        np.save(tmp_path / "v.npy", np.zeros((5, 3), kind))
        assert (datasets.read_vectors(tmp_path / "v.npy", 5) == 0).all()


def test_keep_writes_a_stage_whole(tmp_path):
    def build(journal):
        journal.log({"step": 1})
        return {"x": torch.arange(3), "valid": {"R@10": 0.5}}

    datasets.keep(datasets.Journal(tmp_path), {"a": 1}, build)
    assert datasets.read_kept(tmp_path / "checkpoint.pt")["x"].tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 1 and lines[1]["valid"] == {"R@10": 0.5}
    assert files_under(tmp_path) == ["checkpoint.pt", "config.json", "metrics.jsonl"]


class Code:
    """What a pickle that is not ours might do."""

    def __reduce__(self):
        return os.mkdir, ("evaluated",)


def test_damaged_and_foreign_files_are_set_aside_and_never_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    assert datasets.read_kept(path) is None and capsys.readouterr().err == ""
    datasets.write_checkpoint(path, {"x": torch.arange(3)})
    whole = path.read_bytes()
    place = whole.index(torch.arange(3).numpy().tobytes())
    foreign = []
    for content in ({"x": 1, "of": "other"}, {"x": 1, "of": f"{tmp_path.name}/snapshot.pt"}, [1], Code(),
                    {"of": f"{tmp_path.name}/{path.name}", "x": Code()}):
        torch.save(content, path)
        foreign.append(path.read_bytes())
    for content in (b"", b"\0" * 99, b"cut off", whole[:-30], whole[:place] + b"\1" + whole[place + 1:],
                    pickle.dumps(Code()), *foreign):
        path.write_bytes(content)
        assert datasets.read_kept(path) is None
        assert (tmp_path / "checkpoint.pt.damaged").read_bytes() == content and not path.exists()
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "checkpoint.pt is damaged or not of this program" in err
    assert not (tmp_path / "evaluated").exists()
    path.write_bytes(whole)
    for error in (MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 bytes")):
        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(torch, "load", fail)
        with pytest.raises(type(error)):                                    # no fault of the file
            datasets.read_kept(path)
    assert path.read_bytes() == whole


# ------------------------------------------------------------------------------------------------ 2. codes

def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10]])
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2)).flatten(0, 1)
    found = min((g.kmeans(points, 3) for _ in range(8)), key=lambda c: torch.cdist(points, c).amin(1).sum())
    assert (torch.cdist(centres, found).amin(1) < 0.1).all()
    assert g.kmeans(points[:2], 5).shape == (5, 2)         # fewer points than clusters


def test_quantiser_equals_brute_force():
    quantiser, x = g.ResidualQuantiser(3, 5, 2), torch.randn(7, 2)
    out, books = quantiser(x), quantiser.codebooks.detach()
    for row in range(7):
        residual, loss = x[row], 0.0
        for level in range(3):
            nearest = min(range(5), key=lambda c: float((residual - books[level, c]).square().sum()))
            assert out.codes[row, level] == nearest
            torch.testing.assert_close(out.residuals[level, row], residual)
            residual = residual - books[level, nearest]
        torch.testing.assert_close(out.value[row], x[row] - residual)
    after = torch.cat([out.residuals[1:], (x - out.value)[None]])
    torch.testing.assert_close(out.loss, 1.25 * after.square().mean((1, 2)).sum())


def test_quantiser_gradients_reach_encoder_at_every_level_and_codebooks_only_their_own():
    quantiser, x = g.ResidualQuantiser(3, 5, 2), torch.randn(7, 2, requires_grad=True)
    out = quantiser(x)
    x_grad, = torch.autograd.grad(out.value.sum(), x, retain_graph=True)
    assert torch.equal(x_grad, torch.ones_like(x))                          # straight through
    x_grad, book_grad = torch.autograd.grad(out.loss, [x, quantiser.codebooks])
    after = torch.cat([out.residuals[1:], (x - out.value)[None]]).detach()  # r - q of each level
    torch.testing.assert_close(x_grad, 0.25 * 2 * after.sum(0) / x.numel())
    for level in range(3):
        expected = torch.zeros(5, 2).index_add(0, out.codes[:, level], -2 * after[level] / x.numel())
        torch.testing.assert_close(book_grad[level], expected)


def test_initialisation_and_restart_put_codes_to_use():
    quantiser, x = g.ResidualQuantiser(2, 8, 4), torch.randn(200, 4)
    before = quantiser(x).loss
    quantiser.initialise(x)
    assert quantiser(x).loss < 0.7 * before
    with torch.no_grad():
        quantiser.codebooks[0, 3:] = 100.0
    used = len(quantiser(x).codes[:, 0].unique())
    quantiser.restart_dead_codes(x)
    assert used < 8 and len(quantiser(x).codes[:, 0].unique()) > used


def test_balanced_clusters_are_near_and_of_even_size():
    points = torch.randn(53, 3)
    cluster = datasets.balanced_clusters(points, g.kmeans(points, 10))
    assert torch.bincount(cluster, minlength=10).max() <= 6 and cluster.min() >= 0 and cluster.max() < 10
    apart = torch.arange(40).div(4, rounding_mode="floor")           # ten far groups of four stay whole
    groups = 100.0 * torch.eye(10)[apart] + 0.01 * torch.randn(40, 10)
    assert torch.equal(datasets.balanced_clusters(groups, 100.0 * torch.eye(10)), apart)
    assert datasets.balanced_clusters(points[:1], points[:1]).tolist() == [0]
    nearer = torch.tensor([[0.0], [0.3], [0.2], [9.0]])              # three want the first centre, two may
    assert datasets.balanced_clusters(nearer, torch.tensor([[0.0], [5.0]])).tolist() == [0, 1, 0, 1]


def test_alignment_is_the_cross_entropy_of_finding_ones_own():
    value, collaborative = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    loss = g.alignment_loss(value, collaborative)
    products = (value @ collaborative.T).exp().tolist()
    byhand = -sum(math.log(row[i] / sum(row)) for i, row in enumerate(products)) / 5
    assert loss.item() == pytest.approx(byhand, rel=1e-5)


def test_even_codes_pull_to_the_partner_and_away_from_the_rest():
    codebook, cluster = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 0, 1, 2])
    codes = torch.tensor([0, 3, 4])                     # the partners are 2 and 1; the last has none
    loss = g.even_codes_loss(codebook, cluster, codes)
    total = 0.0
    for own, partner in [(0, 2), (3, 1)]:
        logits = {j: (codebook[own] @ codebook[j]).exp().item() for j in range(5) if j != own}
        total -= math.log(logits[partner] / sum(logits.values()))
    assert loss.item() == pytest.approx(total / 3, rel=1e-5)
    loss.backward()
    assert torch.isfinite(codebook.grad).all() and codebook.grad.abs().sum() > 0
    labels = {g.even_codes_loss(codebook, torch.zeros(5, dtype=torch.long), torch.tensor([0])).item()
              for _ in range(60)}
    assert len(labels) == 4                                                 # any other of one cluster of five


def codes_of(seed=3, **changes):
    """What train_codes makes of 120 items: collaborative vectors know groups that text does not."""
    torch.manual_seed(seed)
    text, groups = torch.randn(120, 6), torch.arange(120) % 6
    collaborative = (3 * F.one_hot(groups, 8).float() + 0.3 * torch.randn(120, 8)).requires_grad_()
    cfg = g.Config(**{**dict(levels=2, codebook_size=12, code_dim=8, code_epochs=400), **changes})
    run = types.SimpleNamespace(cfg=cfg, device=torch.device("cpu"))
    codes = g.train_codes(run, text, collaborative, datasets.Journal())
    assert collaborative.grad is None
    same = groups[:, None] == groups
    return codes, (codes[:, None] == codes).float().mean(-1)[same].mean().item()


def test_letter_without_its_weights_is_the_rqvae_and_alignment_raises_the_overlap():
    plain, before = codes_of()
    letter, _ = codes_of(backbone="letter", alignment=0.0, even_codes=0.0)
    assert torch.equal(letter, plain)
    aligned, after = codes_of(backbone="letter", alignment=1.0, even_codes=0.0)
    assert after > before + 0.05
    evened, _ = codes_of(backbone="letter", alignment=0.0, even_codes=0.1)
    assert not torch.equal(evened, plain)


def test_temperature_divides_the_logits():
    catalogue, state = small_catalogue(), torch.randn(3, 16)
    cold, warm = small_generator(catalogue, temperature=0.5), small_generator(catalogue)
    cold.load_state_dict(warm.state_dict())
    torch.testing.assert_close(cold.code_logits(state, 1), 2 * warm.code_logits(state, 1))


def test_principal_vectors_keep_what_varies_most():
    x = torch.randn(50, 2) @ torch.tensor([[5.0, 0, 0, 0], [0, 2.0, 0, 0]]) + torch.tensor([0, 0, 7.0, 7.0])
    vectors = datasets.principal_vectors(x, 2)
    centred = x - x.mean(0)
    scale = centred.norm() / vectors.norm()
    distances, wanted = [(points[:, None] - points).norm(dim=-1) for points in (vectors * scale, centred)]
    torch.testing.assert_close(distances, wanted, atol=1e-3, rtol=1e-3)     # (torch.cdist errs near 0)
    assert vectors.square().mean() == pytest.approx(1, rel=1e-5)
    assert datasets.principal_vectors(x, 9).shape == (50, 9)


def test_code_figures_by_hand():
    codes = torch.tensor([[0, 0], [0, 3], [2, 1], [2, 1]])
    vectors = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    line = datasets.code_figures(codes, vectors, neighbours=1)      # overlaps 1/2, 1/2, 1, 1
    assert "usage 67%, 75%; collision rate 0.250; overlap with the 1 nearest items of SASRec 0.750" in line


def test_paths_become_unique_by_counting_twins():
    codes = torch.tensor([[1, 2], [0, 5], [1, 2], [1, 2], [0, 5], [3, 3]])
    unique = [[1, 2, 0], [0, 5, 0], [1, 2, 1], [1, 2, 2], [0, 5, 1], [3, 3, 0]]
    assert g.unique_paths(codes).tolist() == unique


def test_codes_round_trip_in_letters_format(tmp_path):
    codes = torch.tensor([[183, 70, 0], [2, 1, 255]])
    (tmp_path / "x.json").write_text(datasets.format_codes(codes))
    assert json.loads((tmp_path / "x.json").read_text())["0"] == ["<a_183>", "<b_70>", "<c_0>"]
    assert torch.equal(datasets.read_codes(tmp_path / "x.json", 2), codes)


@pytest.mark.parametrize("content, words", [
    ('{"0": ["<a_1>"]}', "codes for 1 items"), ('{"0": ["<a_1>"], "2": ["<a_1>"]}', "codes for 2 items"),
    ('{"0": ["<a_1>"], "1": ["<a_1>", "<b_1>"]}', 'item "1" has the codes'),
    ('{"0": ["<b_1>"], "1": ["<b_2>"]}', 'item "0"'), ('{"0": [], "1": []}', 'item "0"'),
    ('{"0": ["<a_1>"], "1": ["a1"]}', 'item "1"'),
    ('{"0": ["<a_1>"], "1": 7}', 'item "1"'), ("[", "not valid JSON")])
def test_wrong_code_files_are_named(tmp_path, content, words):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=words):
        datasets.read_codes(tmp_path / "x.json", 2)


def test_diversity_is_a_mean_over_levels_of_fresh_clusters_and_codes_come_to_rest(monkeypatch):
    clusters, losses = [], []
    monkeypatch.setattr(g, "even_codes_loss", lambda book, c, codes: clusters.append(c) or torch.tensor(7.0))

    def fit(model, title, loss_of, batches, steps, *_, after):
        losses.append(loss_of(torch.arange(120), 0.0).item())
        book = model.quantiser.codebooks.data[0]
        for step, stays in ((steps // 15 * 15, True), (steps // 15, False)):
            book[3:] = 100.0                                    # dead
            after(step)
            assert bool((book[3:] == 100).all()) == stays and model.quantiser.commitment == 0.6

    monkeypatch.setattr(g, "fit", fit)
    for weight in (0.0, 0.5):
        codes_of(backbone="letter", alignment=0.0, even_codes=weight, commitment=0.6)
    assert losses[1] - losses[0] == pytest.approx(3.5, rel=1e-4)
    assert len(clusters) == 2 and all(len(c.unique()) > 3 for c in clusters)


# ----------------------------------------------------------------------------------------------- 3. SASRec

def small_sasrec(n_items=30, length=8):
    model = g.SASRec(n_items, 16, 2, 2, 0.0, length).eval()
    torch.nn.init.normal_(model.item.weight[:-1])
    return model


def test_sasrec_is_causal_and_blind_to_padding():
    model, history = small_sasrec(), torch.randint(30, (4, 6))
    changed = history.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 30
    torch.testing.assert_close(model(history)[:, :3], model(changed)[:, :3])
    assert (model(history)[:, 3] - model(changed)[:, 3]).abs().max() > 1e-3
    padded = F.pad(history, (0, 2), value=30)
    torch.testing.assert_close(model.scores(padded), model.scores(history))
    ended = model.scores(history, torch.tensor([3, 1])).view(4, 2, 30)              # two ends of each history
    torch.testing.assert_close(ended[:, 0], model.scores(history[:, :4]))
    torch.testing.assert_close(ended[:, 1], model.scores(history[:, :2]))
    assert model.scores(history).shape == (4, 30)


def test_sasrec_loss_is_the_cross_entropy_of_every_next_item():
    model = small_sasrec()
    history, target = torch.tensor([[3, 4, 5], [6, 30, 30]]), torch.tensor([[4, 5, 7], [8, 30, 30]])
    cases = [([3], 4), ([3, 4], 5), ([3, 4, 5], 7), ([6], 8)]
    losses = [-model.scores(torch.tensor([h])).log_softmax(1)[0, y] for h, y in cases]
    torch.testing.assert_close(model.loss(history, target, 30), torch.stack(losses).mean())


def test_sasrec_ranks_a_sample_of_a_large_catalogue(monkeypatch):
    model, history = small_sasrec(), torch.tensor([[3, 4, 5], [6, 30, 30]])
    target = torch.tensor([[4, 5, 7], [8, 30, 30]])
    sample = torch.tensor([4, 9, 9, 12, 7])
    monkeypatch.setattr(torch, "randint", lambda high, size, device: sample)
    losses = []
    for h, y in [([3], 4), ([3, 4], 5), ([3, 4, 5], 7), ([6], 8)]:
        scores = model.scores(torch.tensor([h]))[0]
        others = [i for i in sample.tolist() if i != y]         # the right answer is never a wrong one
        losses.append(torch.cat([scores[[y]], scores[others]]).logsumexp(0) - scores[y])
    torch.testing.assert_close(model.loss(history, target, 5), torch.stack(losses).mean())


# --------------------------------------------------------------------------------------------------- 4. T5

# Golden values of Hugging Face's T5ForConditionalGeneration (transformers 5.23.0): vocab 25, d_model 16,
# d_kv 8, d_ff 32, 2 + 2 layers, 2 heads, ReLU, no dropout, tied embeddings. Weight number k of golden_order()
# below is 0.5 * sin(1.7 * i + k), a norm's is 1 more. Kept are the logits of those tokens that can follow.
GOLDEN_LOGITS = [
    [[-0.2107, -0.3462, 0.5405, -0.1687, -0.3797, 0.5305, -0.1256, -0.4108],
     [0.0581, -0.0583, -0.0025, 0.0607, -0.0553, -0.008, 0.063, -0.052],
     [-0.0068, 0.1261, -0.1133, -0.0181, 0.1306, -0.1063, -0.0293, 0.1342]],
    [[-0.2091, -0.3647, 0.5565, -0.1654, -0.3989, 0.5454, -0.1207, -0.4304],
     [0.0141, -0.2185, 0.194, 0.0337, -0.2261, 0.1817, 0.053, -0.2322],
     [-0.0588, 0.1869, -0.1193, -0.0733, 0.1891, -0.1069, -0.0873, 0.19]]]
DISTANCES = [-200, -127, -100, -64, -40, -21, -20, -16, -15, -9, -8, -7, -1, 0,
             1, 7, 8, 9, 12, 15, 16, 20, 21, 40, 64, 100, 127, 200]
GOLDEN_BUCKETS = {True: [15, 15, 15, 14, 12, 10, 10, 10, 9, 8, 8, 7, 1, 0,
                         17, 23, 24, 24, 25, 25, 26, 26, 26, 28, 30, 31, 31, 31],
                  False: [31, 31, 30, 26, 23, 18, 17, 16, 15, 9, 8, 7, 1, 0] + [0] * 14}


def golden_order(model):
    """(shape, destinations) of each weight in the order in which the golden model was filled."""
    yield model.embedding.weight
    for side in ("encoder", "decoder"):
        yield getattr(model, f"{side}_bias").weight
        for block in getattr(model, side):
            for attention, norm in zip([block.attention, block.cross], block.norms[:-1]):
                keys, values = attention.kv.weight.chunk(2)
                yield from (attention.q.weight, keys, values, attention.o.weight, norm.weight)
            yield from (block.wi.weight, block.wo.weight, block.norms[-1].weight)
        yield getattr(model, f"{side}_norm").weight


def test_t5_is_the_standard_t5():
    model = g.T5(3, 8, d_model=16, heads=2, d_kv=8, d_ff=32, layers=2, dropout=0.0).eval()
    with torch.no_grad():
        for k, weight in enumerate(golden_order(model)):
            wave = 0.5 * torch.sin(1.7 * torch.arange(weight.numel(), dtype=torch.float64) + k)
            weight.copy_(wave.view(weight.shape) + (weight.dim() == 1))
    source = (torch.arange(80).view(2, 40) * 7) % 24 + 1
    source[1, 25:] = 0
    state, _ = model.decode(torch.tensor([[[0, 3, 12]], [[0, 8, 9]]]), model.encode(source))
    logits = torch.stack([model.code_logits(state[:, 0, level], level) for level in range(3)], 1)
    torch.testing.assert_close(logits, torch.tensor(GOLDEN_LOGITS), atol=1e-4, rtol=0)


@pytest.mark.parametrize("two_sided", [True, False])
def test_relative_buckets_are_the_standard_ones(two_sided):
    assert g.relative_buckets(torch.tensor(DISTANCES), two_sided).tolist() == GOLDEN_BUCKETS[two_sided]


def test_memory_is_blind_to_padding_and_paths_to_each_other():
    catalogue = small_catalogue()
    model, items = small_generator(catalogue), torch.randint(30, (3, 4))
    history = torch.randint(30, (3, 5))
    log_pf, log_flow = log_probs(model, catalogue, history, items)
    padded, _ = log_probs(model, catalogue, F.pad(history, (0, 3), value=30), items)
    torch.testing.assert_close(padded, log_pf, atol=1e-5, rtol=1e-5)
    for path in range(4):
        alone, flow = log_probs(model, catalogue, history, items[:, path:path + 1])
        torch.testing.assert_close(alone[:, 0], log_pf[:, path], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flow[:, 0], log_flow[:, path], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_causal_encoder_sees_an_item_whole_and_in_both_directions():
    model, tokens = small_generator(small_catalogue(), causal=True), torch.randint(1, 13, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = changed[:, 5] % 12 + 1                      # the last code of the second item
    before, after = (model.encode(x).layers[0][0] for x in (tokens, changed))
    assert ((after - before).abs().amax((0, 1, 3)) > 1e-5).tolist() == 3 * [False] + 6 * [True]
    model.encoder_bias.weight[17] += 1                          # of the key that comes next
    assert (model.encode(tokens).layers[0][0] - before).abs().max() > 1e-3


def test_dropout_is_wherever_t5_and_sasrec_have_it():
    catalogue, calls = small_catalogue(), []
    model, sasrec = small_generator(catalogue, dropout=0.1).train(), small_sasrec().train()
    for dropout in (model.dropout, sasrec.dropout):
        dropout.register_forward_hook(lambda module, *_: calls.append(module))
    log_probs(model, catalogue, torch.randint(30, (2, 5)), torch.tensor([[1], [2]]))
    sasrec(torch.randint(30, (2, 5)))           # embedded, 2 blocks of 4 or, in the decoder, 6, the last norm
    assert (calls.count(model.dropout), calls.count(sasrec.dropout)) == (1 + 8 + 1 + 1 + 12 + 1, 1)


def test_probabilities_and_scores_are_float32_under_autocast():
    catalogue, history, items = small_catalogue(), torch.randint(30, (2, 5)), torch.arange(30).expand(2, -1)
    with torch.autocast("cpu", torch.bfloat16):
        log_pf, log_flow = log_probs(small_generator(catalogue), catalogue, history, items)
        scores = small_sasrec().scores(history)
    assert log_pf.dtype == log_flow.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(log_pf.sum(-1).exp().sum(1), torch.ones(2), atol=1e-3, rtol=0)


def rows_of_histories():
    """Histories (3, 5) of 5, 3 and 2 items, and the item after each of their items."""
    history, last = torch.randint(30, (3, 5)), torch.randint(30, (3, 1))
    target = torch.cat([history[:, 1:], last], 1)
    for row, n in enumerate((5, 3, 2)):
        history[row, n:], target[row, n:], target[row, n - 1] = 30, 30, last[row, 0]
    return history, target


@pytest.mark.parametrize("loss", ["sft", "tb", "db", "smooth", "exact"])
def test_a_causal_encoder_reads_all_histories_of_a_row_at_once(loss):
    catalogue, (history, target) = small_catalogue(), rows_of_histories()
    model = small_generator(catalogue, causal=True)
    cfg = g.Config(loss=loss, sampler="none", share=1.0, lam=0.5)
    tuning = g.FineTuning(model, small_sasrec(), catalogue, cfg)
    alone = [tuning.loss(history[row:row + 1, :n + 1], target[row:row + 1, n], 0.5)
             for row in range(3) for n in range(5) if target[row, n] < 30]
    together = tuning.loss(history, target, 0.5)
    torch.testing.assert_close(together, torch.stack(alone).mean())
    of = [torch.autograd.grad(value, model.embedding.weight)[0] for value in (together, sum(alone) / 10)]
    torch.testing.assert_close(*of)


@pytest.mark.parametrize("loss", ["tb", "sdpo"])
def test_no_history_of_a_row_draws_an_item_of_the_row_as_unclicked(loss):
    catalogue, rows = small_catalogue(), torch.stack([torch.randperm(30)[:7] for _ in range(4)])
    cfg = g.Config(loss=loss, k=23, negatives=23, pool=30)              # all that the row has not clicked
    tuning = g.FineTuning(small_generator(catalogue, causal=True), small_sasrec(), catalogue, cfg)
    history, target = rows[:, :-1], rows[:, 1:]
    drawn = tuning.trajectories(g.METHODS[loss], history, target, 0.5, torch.tensor([3, 0])).items[:, 1:]
    for row, items in zip(rows.repeat_interleave(2, 0), drawn):         # nor one that comes after both
        assert sorted(row.tolist() + items.tolist()) == list(range(30))


@pytest.mark.parametrize("loss", ["tb", "sdpo"])
def test_padding_clicks_nothing(loss, monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))     # all targets, in order
    catalogue, (history, target) = small_catalogue(), rows_of_histories()
    history, target = (torch.where(x == 0, 1, x) for x in (history, target))
    tuning = g.FineTuning(small_generator(catalogue, causal=True), small_sasrec(), catalogue,
                          g.Config(loss=loss, k=20, negatives=20, pool=30, share=1.0))
    draw, drawn = tuning.trajectories, []
    tuning.trajectories = lambda method, *rest: drawn.append((method, draw(method, *rest))) or drawn[-1][1]
    tuning.loss(history, target, 0.5)
    items = drawn[-1][1].items.view(3, 5, 21)
    assert torch.equal(items[..., 0].where(target < 30, 30), target)
    for row in range(3):                # item 0, which nobody clicked, is drawn 20 times of 24 and more
        assert (items[row, :, 1:] == 0).any()
        assert not torch.isin(items[row, :, 1:], history[row]).any()


def test_a_causal_encoder_draws_and_searches_after_each_end_of_a_row():
    catalogue, history = small_catalogue(), torch.randint(30, (3, 5))
    model, ends = small_generator(catalogue, causal=True), torch.tensor([4, 1, 0])
    items, score = g.beam_search(model, catalogue, catalogue.read(model, history, ends), 6)
    for number, end in enumerate(ends.tolist()):
        alone = F.pad(history[:, :end + 1], (0, 2), value=30)
        expected = g.beam_search(model, catalogue, catalogue.read(model, alone), 6)
        assert torch.equal(items.view(3, 3, 6)[:, number], expected[0])
        torch.testing.assert_close(score.view(3, 3, 6)[:, number], expected[1])
    for loss in ("ipa", "grpo", "sprec"):
        tuning = g.FineTuning(model, small_sasrec(), catalogue, g.Config(loss=loss, beam=4, group=4))
        paths = tuning.trajectories(g.METHODS[loss], history, torch.arange(15).view(3, 5), 1.0, ends)
        assert paths.items[:, 0].tolist() == [4, 1, 0, 9, 6, 5, 14, 11, 10]
        log_pf, *_ = g.path_log_probs(model, catalogue, catalogue.read(model, history, ends), paths.items)
        torch.testing.assert_close(paths.log_ref, log_pf.sum(-1).detach())


def test_decoder_is_causal_and_its_cache_changes_nothing():
    catalogue = small_catalogue()
    model, tokens = small_generator(catalogue), torch.randint(1, 13, (2, 3, 4))
    memory = model.encode(torch.randint(1, 13, (2, 6)))
    whole, _ = model.decode(tokens, memory)
    changed = tokens.clone()
    changed[..., 2] = changed[..., 2] % 12 + 1
    torch.testing.assert_close(model.decode(changed, memory)[0][:, :, :2], whole[:, :, :2])
    tokens[..., 0], past = 0, None
    whole = model.decode_paths(tokens, memory)              # as one tree, and step by step
    torch.testing.assert_close(model.decode(tokens, memory)[0], whole, atol=1e-5, rtol=1e-5)
    for step in range(4):
        state, past = model.decode(tokens[..., step:step + 1], memory, past)
        torch.testing.assert_close(state[:, :, 0], whole[:, :, step], atol=1e-5, rtol=1e-5)


def test_dropout_keeps_its_rate_and_mean_and_draws_anew():
    dropout, x = g.Dropout(0.1), torch.ones(400, 500)
    first, second = dropout(x), dropout(x)
    for y in (first, second):
        assert abs((y == 0).float().mean() - 0.1) < 0.005 and abs(y.mean() - 1) < 0.005
        assert y.unique().tolist() == pytest.approx([0, 1 / 0.9])
    together = ((first == 0) & (second == 0)).float().mean()
    assert abs(together - 0.01) < 0.002                    # as rare as independent masks would have it
    assert abs((first[:-1] == 0)[second[1:] == 0].float().mean() - 0.1) < 0.01
    torch.manual_seed(1)
    alone = dropout(2 * x)
    torch.manual_seed(1)
    torch.testing.assert_close(dropout(2 * x, onto=3 * x), alone + 3)           # the same mask, and added
    assert dropout.eval()(x) is not first and torch.equal(dropout(x), x)
    assert torch.equal(dropout(x, onto=3 * x), 4 * x)


def test_norm_and_its_gradient_are_torchs():
    norm, x = g.RMSNorm(12), torch.randn(3, 5, 12, requires_grad=True)
    torch.nn.init.normal_(norm.weight)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        y = x.to(dtype)
        ours, torchs = norm(y), F.rms_norm(y, (12,), norm.weight.to(dtype), 1e-6)
        torch.testing.assert_close(ours, torchs, atol=tolerance, rtol=tolerance)
        along = torch.randn_like(ours)
        for one, other in zip(*(torch.autograd.grad(out, (x, norm.weight), along) for out in (ours, torchs))):
            torch.testing.assert_close(one, other, atol=4 * tolerance, rtol=tolerance)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")        # of torch itself
def test_compiled_blocks_are_close_to_eager_ones():
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no compiler")
    catalogue = small_catalogue()
    model, history, items = small_generator(catalogue, layers=1), torch.randint(30, (4, 3)), torch.arange(8)
    items = items.view(4, 2)
    plain, _ = log_probs(model, catalogue, history, items)
    for block in (*model.encoder, *model.decoder):
        block.compile(dynamic=True)
    twin = copy.deepcopy(model)                         # as a reference policy: its weights are its own
    torch.nn.init.normal_(twin.decoder[0].wo.weight)
    assert (log_probs(twin, catalogue, history, items)[0] - plain).abs().max() > 0.01
    torch.testing.assert_close(log_probs(model, catalogue, history, items)[0], plain, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")        # of torch itself
def test_compiled_blocks_have_room_for_all_their_shapes(monkeypatch):
    counters, catalogue = importlib.import_module("torch._dynamo.utils").counters, small_catalogue()
    quick = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 8)    # its own; put back at the end
    model = small_generator(catalogue, layers=1, causal=True, dropout=0.1)
    counters.clear()
    settings = types.SimpleNamespace(cfg=types.SimpleNamespace(compile=True))
    datasets.Run.compiled(settings, model, "encoder", "decoder")
    for loss in ("sft", "tb"):
        tuning = g.FineTuning(model, small_sasrec(length=20), catalogue, g.Config(loss=loss, pool=30, k=2))
        for batch, length in ((3, 7), (1, 20), (20, 2), (12, 1), (5, 5), (4, 3)):
            model.train()
            tuning.loss(*torch.randint(30, (2, batch, length)), 0.5).backward()
        model.eval()
        for batch, length in ((9, 7), (1, 3), (4, 4)):
            g.beam_search(model, catalogue, catalogue.read(model, torch.randint(30, (batch, length))), 5)
    assert counters["stats"]["unique_graphs"] > 8
    assert not [reason for reason in counters["unimplemented"] if "limit" in reason]


# ------------------------------------------------------------------------------------------------- 5. trie

def test_trie_holds_exactly_the_items():
    catalogue = small_catalogue(n_items=37)
    trie, codes = catalogue.trie, catalogue.codes.tolist()
    for item, path in enumerate(codes):
        node = torch.tensor(0)
        for level, code in enumerate(path):
            assert trie.path[item, level] == node
            child, allowed = trie.log_probs(torch.zeros(4), node, level)
            real = allowed > -torch.inf
            expected = sorted({other[level] for other in codes if other[:level] == path[:level]})
            assert trie.code[child[real]].tolist() == expected
            node = child[expected.index(code)]
        assert trie.leaf_item[node - trie.first_leaf] == item
    assert len(trie.code) == 1 + sum(len({tuple(p[:l]) for p in codes}) for l in (1, 2, 3))


def test_trie_refuses_items_of_one_path():
    with pytest.raises(ValueError, match="3 items have only 2 different paths"):
        g.Trie(torch.tensor([[0, 1], [1, 1], [0, 1]]))


def test_probabilities_of_all_items_sum_to_one():
    catalogue = small_catalogue()
    items = torch.arange(30).expand(2, -1)
    log_pf, _ = log_probs(small_generator(catalogue), catalogue, torch.randint(30, (2, 5)), items)
    torch.testing.assert_close(log_pf.sum(-1).exp().sum(1), torch.ones(2))


def test_over_all_codes_a_path_shares_its_probability_with_what_is_no_item():
    catalogue, history, items = small_catalogue(), torch.randint(30, (2, 5)), torch.arange(30).expand(2, -1)
    model, every = small_generator(catalogue), torch.tensor(list(itertools.product(range(4), repeat=3)))
    log_all, _ = log_probs(model, g.Catalogue.of(catalogue.codes, 3, all_codes=True), history, items)
    whole, memory = g.Catalogue.of(every, 3), catalogue.read(model, history)    # every path leads to an item
    place = torch.tensor([every.tolist().index(path) for path in catalogue.codes.tolist()])
    expected = g.path_log_probs(model, whole, memory, place.expand(2, -1))[0]
    torch.testing.assert_close(log_all, expected)
    assert (log_all.sum(-1).exp().sum(1) < 0.9).all()
    found, score = g.beam_search(model, g.Catalogue.of(catalogue.codes, 3, all_codes=True), memory, 30)
    best = log_all.sum(-1).sort(descending=True)
    assert torch.equal(found, best.indices)
    torch.testing.assert_close(score, best.values)


# ----------------------------------------------------------------------------------------- 6. trajectories

def test_curriculum_avoids_clicked_items_and_grows_harder():
    scores, pool = torch.randn(200, 40), torch.randperm(60)[:40]
    exclude = pool[torch.randint(40, (200, 5))]
    column = {int(item): i for i, item in enumerate(pool)}
    hardness = []
    for beta in (-3.0, -1.0, 0.0, 1.0, 3.0):
        items = g.curriculum_sample(scores, pool, exclude, 4, beta)
        assert not (items[:, :, None] == exclude[:, None]).any()
        assert all(len(set(row)) == 4 and set(row) <= column.keys() for row in items.tolist())
        columns = torch.tensor([[column[i] for i in row] for row in items.tolist()])
        hardness.append(scores.gather(1, columns).mean().item())
    assert hardness == sorted(hardness) and hardness[0] < -1 and hardness[-1] > 1 and abs(hardness[2]) < 0.15


def test_curriculum_draws_from_the_softmax_it_names():
    scores, pool = torch.tensor([[0.0, 1.0, 3.0]]).repeat(20000, 1), torch.arange(3)
    drawn = g.curriculum_sample(scores, pool, torch.full((20000, 1), 9), 1, 0.7)
    z = (scores[0] - scores[0].mean()) / scores[0].std(correction=0)
    share = torch.bincount(drawn.flatten(), minlength=3) / 20000
    torch.testing.assert_close(share, (0.7 * z).softmax(0), atol=0.015, rtol=0)


class Scores(torch.nn.Module):
    """A collaborative model with given scores (N,) for every user."""

    def __init__(self, values):
        super().__init__()
        self.values = torch.nn.Parameter(torch.tensor(values))

    def scores(self, history, ends=None):
        return self.values.expand(len(history), -1)


def trajectories(loss, teacher, history, target, progress, **changes):
    """Of a method, over a catalogue of as many items as the teacher has scores."""
    catalogue = small_catalogue(n_items=len(teacher.values))
    tuning = g.FineTuning(small_generator(catalogue), teacher, catalogue, g.Config(loss=loss, **changes))
    return tuning.trajectories(g.METHODS[loss], history, target[:, None], progress)


def test_trajectories_put_the_observed_first_and_scale_scores_to_the_unit_interval():
    teacher = Scores([5.0, 1.0, 3.0, 2.0, 0.0, 4.0])
    history, target = torch.tensor([[0], [3]]), torch.tensor([2, 4])
    paths = trajectories("tb", teacher, history, target, 0.5, k=2, pool=6, reward="cf")
    items = paths.items
    assert items[:, 0].tolist() == [2, 4] and items.shape == (2, 3) and not paths.reward.requires_grad
    torch.testing.assert_close(paths.reward, (teacher.values.detach()[items] / 5).clamp(min=1e-4))
    assert not (items[:, 1:] == target[:, None]).any() and not (items == history).any()
    alone = trajectories("tb", teacher, history, target, 0.5, sampler="none")
    assert alone.items.tolist() == [[2], [4]]


def test_curriculum_follows_the_progress_of_training():
    teacher, history = Scores([float(i) for i in range(50)]), torch.full((100, 1), 20)

    def mean_item(progress, **changes):
        target = torch.full((100,), 30)
        paths = trajectories("tb", teacher, history, target, progress, k=4, pool=50, **changes)
        return paths.items[:, 1:].float().mean()

    assert mean_item(0.0) < 12 and mean_item(1.0) > 37
    assert abs(mean_item(1.0, sampler="random") - 24.5) < 3


# ----------------------------------------------------------------------------------------------- 7. reward

def test_collaborative_score_by_its_two_scales():
    scores = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert g.collaborative_score(scores).tolist() == [pytest.approx([0, 1, 1 / 3, 2 / 3])]
    p = scores.softmax(1)[0]
    assert g.collaborative_score(scores, "softmax").tolist() == [pytest.approx((p / p[1]).tolist())]


def test_reward_and_confidence_by_hand():
    # The clicked item, a near twin that the collaborative model likes, and a stranger that it does not.
    r_aug, r_cs = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.9, 0.7, 0.1]])
    r_sim = g.shared_codes(torch.tensor([[[1, 2, 3, 4], [1, 2, 0, 4], [5, 2, 7, 8]]]))
    assert r_sim.tolist() == [[1.0, 0.75, 0.25]]
    torch.testing.assert_close(g.reward(r_aug, r_cs, r_sim), torch.tensor([[2.9, 1.45, 0.35]]))
    torch.testing.assert_close(g.reward(r_aug, r_cs, r_sim, "cf,aug"), torch.tensor([[1.9, 0.7, 0.1]]))
    torch.testing.assert_close(g.reward(r_aug, r_cs, r_sim, "sim"), r_sim)
    torch.testing.assert_close(g.confidence(r_aug, r_cs), torch.tensor([[0.9, 0.3, 0.9]]))


# ------------------------------------------------------------------------------------------- 8. objectives

def tabular_flows(catalogue, log_reward):
    """Exact log P_F and log F along each item's path, when every leaf holds its reward: (N, L) each."""
    trie = catalogue.trie
    flow = torch.full((len(trie.code),), -torch.inf, dtype=torch.float64)
    for item, path in enumerate(trie.path.tolist()):
        for node in path:
            flow[node] = torch.logaddexp(flow[node], log_reward[item])
    return flow[trie.path[:, 1:]] - flow[trie.path[:, :-1]], flow[trie.path[:, :-1]]


def test_exact_flows_balance():
    catalogue, log_reward = small_catalogue(), torch.randn(30, dtype=torch.float64)
    log_pf, log_flow = tabular_flows(catalogue, log_reward)
    torch.testing.assert_close(log_pf.sum(1), log_reward.log_softmax(0))             # p = R / Z
    assert g.detailed_balance(log_pf, log_flow, log_reward).max() < 1e-20
    assert g.trajectory_balance(log_pf, log_flow, log_reward).max() < 1e-20
    for objective, steps_off, squared in [(g.trajectory_balance, 0, 4.0), (g.detailed_balance, 0, 4.0),
                                          (g.trajectory_balance, 1, 9.0), (g.detailed_balance, 1, 3.0)]:
        off = objective(log_pf + steps_off, log_flow, log_reward + 2 * (1 - steps_off))
        torch.testing.assert_close(off, torch.full((30,), squared).double())


def test_sft_is_the_cross_entropy_over_allowed_codes():
    catalogue = small_catalogue()
    model, history, target = small_generator(catalogue), torch.randint(30, (4, 5)), torch.randint(30, (4,))
    everything, _ = log_probs(model, catalogue, history, torch.arange(30).expand(4, -1))
    log_pf, _ = log_probs(model, catalogue, history, target[:, None])
    torch.testing.assert_close(g.sft(log_pf[:, 0]).mean(), F.cross_entropy(everything.sum(-1), target))


@pytest.mark.parametrize("objective", [g.trajectory_balance, g.detailed_balance])
def test_training_on_balance_makes_probabilities_proportional_to_rewards(objective):
    catalogue = small_catalogue(n_items=12)
    model = small_generator(catalogue, d_model=32, layers=1).train()
    history, items = torch.tensor([[0, 1], [2, 3]]), torch.arange(12).expand(2, -1)
    log_reward = torch.randn(2, 12)
    optimiser = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    for step in range(600):
        optimiser.param_groups[0]["lr"] = 0.01 * (1 - step / 600)
        log_pf, log_flow = log_probs(model, catalogue, history, items)
        optimiser.zero_grad()
        objective(log_pf, log_flow, log_reward).mean().backward()
        optimiser.step()
    log_pf, log_flow = log_probs(model, catalogue, history, items)
    distance = 0.5 * (log_pf.sum(-1).exp() - log_reward.softmax(1)).abs().sum(1)    # total variation
    assert distance.max() < 0.02
    torch.testing.assert_close(log_flow[:, 0, 0], log_reward.logsumexp(1), atol=0.05, rtol=0)


@pytest.mark.parametrize("scale", ["minmax", "softmax"])
@pytest.mark.parametrize("loss", ["tb", "db"])
def test_the_known_flow_balances_where_the_reward_is_the_teachers_alone(loss, scale):
    catalogue, history, target = small_catalogue(), torch.randint(30, (2, 4)), torch.tensor([7, 8])
    teacher = Scores(torch.randn(30).tolist())
    paths = trajectories(loss, teacher, history, target, 0.5, reward="cf", scale=scale, k=5, pool=30)
    r_cs = g.collaborative_score(teacher.values.detach()[None], scale)[0].clamp(min=1e-4)
    codes, levels = catalogue.codes, range(catalogue.codes.shape[1] + 1)
    below = torch.tensor([[r_cs[(codes[:, :level] == codes[item, :level]).all(1)].sum().item()
                           for level in levels] for item in paths.items.flatten()]).view(2, 6, -1).log()
    known = below[..., :-1] if loss == "db" else below[..., :1, :1].expand(-1, -1, 1)[:, :1]
    torch.testing.assert_close(paths.log_known, known)
    balance = {"tb": g.trajectory_balance, "db": g.detailed_balance}[loss]
    residual = balance(below.diff(), torch.zeros_like(below[..., 1:]) + paths.log_known, paths.reward.log())
    torch.testing.assert_close(residual, torch.zeros(2, 6), atol=1e-8, rtol=0)


def test_the_flow_head_tells_what_is_not_known_of_the_flow():
    model, sasrec, catalogue, cfg, history, target = method_setting(loss="db", sampler="none")
    tuning, method, asked = g.FineTuning(model, sasrec, catalogue, cfg), g.METHODS["db"], []
    paths = tuning.trajectories(method, history, target[:, None], 0.5)
    spy = method._replace(objective=lambda y, c: asked.append(y.log_flow) or y.log_pf.sum((1, 2)))
    tuning.term(spy, history, target, 0.5, None, None)
    head = log_probs(model, catalogue, history, target[:, None])[1]
    assert paths.log_known.shape == head.shape and head.abs().min() > 0
    torch.testing.assert_close(asked[0], head + paths.log_known)


def test_smoothing_is_the_cross_entropy_to_the_codes_that_lead_to_an_item():
    catalogue = small_catalogue()
    model, history, items = small_generator(catalogue), torch.randint(30, (2, 4)), torch.randint(30, (2, 3))
    flow = trajectories("smooth", Scores([0.0] * 30), history, items[:, 0], 0.5).flow
    *_, even = g.path_log_probs(model, catalogue, catalogue.read(model, history), items, flow)
    every = log_probs(model, catalogue, history, torch.arange(30).expand(2, -1))[0].detach()
    codes = catalogue.codes
    for user, slot, level in itertools.product(range(2), range(3), range(3)):
        alike = (codes[:, :level] == codes[items[user, slot], :level]).all(1)       # each child once
        step = {int(code): every[user, item, level].item() for item, code in enumerate(codes[:, level])
                if alike[item]}
        assert even[user, slot, level].item() == pytest.approx(np.mean(list(step.values())), abs=1e-4)
    log_pf, mean_log = torch.full((2, 3, 3), -1.0), torch.full((2, 3, 3), -2.0)
    paths = g.Paths(items, None, None, log_pf=log_pf, mean_log=mean_log)
    loss = g.METHODS["smooth"].objective(paths, g.Config(smoothing=0.25))
    assert loss.tolist() == pytest.approx([0.75 * 3 + 0.25 * 6] * 2)


def test_flow_is_the_sum_of_all_that_lies_below():
    catalogue, leaf = small_catalogue(), torch.rand(2, 30)
    flow, codes = catalogue.trie.flows(leaf), catalogue.codes
    for item, level in itertools.product(range(30), range(codes.shape[1] + 1)):
        below = (codes[:, :level] == codes[item, :level]).all(1)
        torch.testing.assert_close(flow[:, catalogue.trie.path[item, level]], leaf[:, below].sum(1))


def test_exact_is_the_cross_entropy_to_where_the_teachers_flow_goes():
    catalogue = small_catalogue()
    model, history, items = small_generator(catalogue), torch.randint(30, (2, 4)), torch.randint(30, (2, 3))
    memory, teacher = catalogue.read(model, history), torch.rand(2, 30).softmax(1) ** 2
    *_, mean = g.path_log_probs(model, catalogue, memory, items, catalogue.trie.flows(teacher))
    every = log_probs(model, catalogue, history, torch.arange(30).expand(2, -1))[0]
    for user, slot, level in itertools.product(range(2), range(3), range(3)):
        below = (catalogue.codes[:, :level] == catalogue.codes[items[user, slot], :level]).all(1)
        weight = teacher[user] * below
        assert mean[user, slot, level].item() == pytest.approx(
            ((weight * every[user, :, level]).sum() / weight.sum()).item(), abs=1e-5)
    own = every.sum(-1).exp().detach()              # of all teachers, itself leaves it where it is
    g.path_log_probs(model, catalogue, memory, items, catalogue.trie.flows(own))[2].sum().backward()
    assert max(weight.grad.abs().max() for weight in model.parameters() if weight.grad is not None) < 1e-4


def test_exact_asks_sasrec_for_its_probability_of_each_item():
    teacher, history = Scores([5.0, 1.0, 3.0, 2.0, 0.0, 4.0]), torch.tensor([[0], [3]])
    paths = trajectories("exact", teacher, history, torch.tensor([2, 4]), 0.5)
    assert paths.items.tolist() == [[2], [4]] and not paths.flow.requires_grad
    leaf = small_catalogue(n_items=6).trie.path[:, -1]
    torch.testing.assert_close(paths.flow[:, leaf], teacher.values.detach().softmax(0).expand(2, -1))
    sure = Scores([500.0, 0.0, 0.0, 0.0, 0.0, 0.0])     # the others' softmax is 0 in float32
    assert (trajectories("exact", sure, history, torch.tensor([2, 4]), 0.5).flow > 0).all()


def test_dpo_by_hand():
    chosen, rejected = torch.randn(6).double(), torch.randn(6, 3).double()
    zero = torch.zeros(4)
    torch.testing.assert_close(g.dpo(zero, zero[:, None], 1.0), torch.full((4,), math.log(2)))
    torch.testing.assert_close(g.dpo(zero, torch.zeros(4, 5), 0.3), torch.full((4,), math.log(6)))
    pairwise = [-math.log(1 / (1 + math.exp(-0.7 * (c - r)))) for c, r in zip(chosen, rejected[:, 0])]
    torch.testing.assert_close(g.dpo(chosen, rejected[:, :1], 0.7), torch.tensor(pairwise).double())
    ranked = [math.log(1 + sum(math.exp(0.7 * (r - c)) for r in row)) for c, row in zip(chosen, rejected)]
    torch.testing.assert_close(g.dpo(chosen, rejected, 0.7), torch.tensor(ranked).double())
    assert torch.isfinite(g.dpo(torch.tensor([-400.0]), torch.tensor([[500.0, 0.0]]), 1.0)).all()


def test_ipa_sets_the_best_against_the_worst_reward():
    margin, reward = torch.randn(2, 4), torch.tensor([[1.0, 3, 0, 2], [5, 1, 2, 4]])
    expected = torch.stack([F.softplus(margin[0, 2] - margin[0, 1]), F.softplus(margin[1, 1] - margin[1, 0])])
    torch.testing.assert_close(g.ipa(margin, reward, 1.0), expected)


def test_clipped_loss_by_hand():
    log_old, advantage = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    log_p = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    loss = g.clipped_loss(log_p, log_old, log_p.detach(), advantage, 0.2, 0.0)
    torch.testing.assert_close(loss, torch.tensor([[-1.2, -0.5, 1.5, 0.8]]))
    loss.sum().backward()
    assert [bool(x) for x in log_p.grad[0]] == [False, True, True, False]   # clipped where it went too far


def test_the_kl_term_is_the_divergence_on_average_and_never_negative():
    p, q = torch.randn(7).softmax(0).double(), torch.randn(7).softmax(0).double()
    each = g.clipped_loss(p.log(), p.log(), q.log(), torch.zeros(7), 0.2, 1.0)
    assert (each >= 0).all() and each.dtype == torch.float64
    torch.testing.assert_close((p * each).sum(), (p * (p / q).log()).sum())


def test_equal_rewards_give_no_advantage_and_grpo_scales_by_the_group():
    log_p = torch.randn(3, 4, requires_grad=True)
    g.grpo(log_p, log_p.detach(), log_p.detach(), torch.full((3, 4), 1.7), 0.2, 0.0).sum().backward()
    assert log_p.grad.abs().max() == 0
    reward = torch.tensor([[1.0, 2, 3, 6]])
    one = torch.zeros(1, 4, requires_grad=True)
    g.grpo(one, one.detach(), one.detach(), reward, 0.2, 0.0).sum().backward()
    advantage = (reward - 3) / (math.sqrt(3.5) + 1e-4)
    torch.testing.assert_close(one.grad, -advantage / 4)


def test_ppo_is_the_clipped_loss_of_reward_minus_value_and_trains_the_value():
    log_p, value = torch.randn(2, 3, requires_grad=True), torch.randn(2, requires_grad=True)
    log_old, log_ref, reward = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 3)
    loss = g.ppo(log_p, log_old, log_ref, reward, value, 0.2, 0.1)
    for b, (new, old, ref) in enumerate(zip(log_p.tolist(), log_old.tolist(), log_ref.tolist())):
        total = 0.0
        for i in range(3):
            ratio, a = math.exp(new[i] - old[i]), (reward[b, i] - value[b]).item()
            q = math.exp(ref[i] - new[i])
            gain = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            total += 0.1 * (q - 1 - math.log(q)) - gain + 0.5 * a ** 2
        assert loss[b].item() == pytest.approx(total / 3, rel=1e-4)
    loss.sum().backward()
    torch.testing.assert_close(value.grad, (value.detach() - reward.mean(1)))


@pytest.mark.parametrize("loss", ["ppo", "grpo"])
@pytest.mark.parametrize("scores, moves", [([0.0, 1.0], True), ([1.0, 1.0], False)])
def test_policies_move_to_the_better_of_two_items_and_stay_put_where_both_are_alike(loss, scores, moves):
    catalogue = g.Catalogue.of(torch.tensor([[0, 1], [1, 0]]), 2)
    model, teacher = small_generator(catalogue, layers=1, dropout=0.1), Scores(scores)
    cfg = g.Config(loss=loss, group=8, reward="cf", kl=0.0)
    tuning, history = g.FineTuning(model, teacher, catalogue, cfg), torch.tensor([[0], [1]] * 8)

    def share():                                                # of the second item
        items = torch.tensor([[1]] * 16)
        return log_probs(model.eval(), catalogue, history, items)[0].sum(-1).exp().mean().item()

    before = share()
    optimiser = (torch.optim.Adam if moves else torch.optim.SGD)(model.parameters(), 0.01)
    for step in range(1, 121):
        optimiser.zero_grad()
        tuning.loss(history, torch.zeros(16, dtype=torch.long), 0.5).backward()
        if not moves:                                           # nothing but PPO's value may learn
            moved = [p for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 1e-3]
            assert loss == "ppo" or not moved
        optimiser.step()
        tuning.refresh(step, 120)
    if moves:
        assert share() > max(0.9, before)
    elif loss == "grpo":
        assert share() == pytest.approx(before, abs=1e-4)


def test_draws_follow_the_policy_and_are_real_items():
    catalogue = small_catalogue(n_items=8)
    model, history = small_generator(catalogue), torch.tensor([[0, 1]])
    items, found = g.beam_search(model, catalogue, catalogue.read(model, history), 20000, draws=True)
    log_p = log_probs(model, catalogue, history, torch.arange(8)[None])[0].sum(-1)[0]
    share = torch.bincount(items[0], minlength=8) / 20000
    torch.testing.assert_close(share, log_p.exp().detach(), atol=0.015, rtol=0)
    torch.testing.assert_close(found[0], log_p[items[0]].detach(), atol=1e-5, rtol=1e-5)


def test_a_share_of_the_targets_gets_paths_from_as_many_rows_as_there_are(monkeypatch):
    model, sasrec, catalogue, cfg, *_ = method_setting(share=0.125)
    tuning, asked = g.FineTuning(model, sasrec, catalogue, cfg), {}

    def spy(method, history, target, progress, ends, memory):
        asked[method.with_sft] = (len(history), None if ends is None else len(ends))
        if memory is not None:
            assert memory.bias.shape[:3] == (len(history), 1, 1 if ends is None else len(ends))
            assert all(len(keys) == len(values) == len(history) for keys, values in memory.layers)
        return 0.0

    monkeypatch.setattr(tuning, "term", spy)
    for n, some in ((1, 1), (13, 2), (17, 2), (32, 4)):             # rounded, one at least
        tuning.loss(torch.randint(30, (n, 4)), torch.randint(30, (n,)), 0.5)
        assert asked == {False: (n, None), True: (some, None)}
    tuning.model = small_generator(catalogue, causal=True)
    for n, length, some, ends in ((12, 20, 10, 3), (128, 2, 32, 1), (40, 6, 30, 1), (1, 8, 1, 1)):
        tuning.loss(torch.randint(30, (n, length)), torch.randint(30, (n, length)), 0.5)
        assert asked == {False: (n, length), True: (some, ends)}
    for length in range(1, 21):                                 # rounding takes nothing of a batch of 256
        n = 256 // length
        tuning.loss(torch.randint(30, (n, length)), torch.randint(30, (n, length)), 0.5)
        assert 0.118 < math.prod(asked[True]) / (n * length) < 0.131


def test_confidence_is_by_min_max_scores_whatever_the_rewards_scale():
    teacher, history, target = Scores([5.0, 1.0, 3.0, 2.0, 0.0, 4.0]), torch.tensor([[0]]), torch.tensor([2])
    for scale, r_cs in (("minmax", 0.6), ("softmax", math.exp(-2))):
        paths = trajectories("tb", teacher, history, target, 0.5, sampler="none", scale=scale, reward="cf")
        assert paths.reward.item() == pytest.approx(r_cs) and paths.weight.item() == pytest.approx(0.6)


@pytest.mark.parametrize("loss", ["tb", "exact"])
def test_a_share_has_the_whole_losss_expectation(loss):
    catalogue, (history, target) = small_catalogue(), rows_of_histories()
    history, target = history[:, :3], target[:, :3].where(target[:, :3] < 30, 7)        # no padding
    model, sasrec = small_generator(catalogue, causal=True), small_sasrec()
    settings = [g.Config(loss=loss, sampler="none", lam=1.0, share=share) for share in (0.12, 1.0)]
    some, whole = (g.FineTuning(model, sasrec, catalogue, cfg) for cfg in settings)     # 0.12: one of nine
    with torch.no_grad():
        found = torch.stack([some.loss(history, target, 0.5) for _ in range(400)])
        expected = whole.loss(history, target, 0.5)
    assert abs(found.mean() - expected) <= 4 * found.std() / 20 + 1e-4 * expected
    assert (found.std() > 1e-4) == (loss == "tb")


@pytest.mark.parametrize("loss", list(g.METHODS))
def test_what_each_method_knows_of_its_trajectories(loss):
    model, sasrec, catalogue, cfg, history, target = method_setting(loss=loss, beam=6, group=5)
    tuning = g.FineTuning(model, sasrec, catalogue, cfg)
    paths = tuning.trajectories(g.METHODS[loss], history, target[:, None], 0.9)
    size = {"sft": 1, "db": 4, "tb": 4, "dpo": 2, "sdpo": 4, "sprec": 2, "ipa": 7, "ppo": 6, "grpo": 6,
            "smooth": 1, "exact": 1}[loss]
    assert paths.items.shape == (4, size) and torch.equal(paths.items[:, 0], target)
    assert paths.items.min() >= 0 and paths.items.max() < 30
    log_p = log_probs(model, catalogue, history, paths.items)[0].sum(-1).detach()
    if g.METHODS[loss].source in ("random", "curriculum"):
        clicked = torch.cat([history, target[:, None]], 1)
        assert not (paths.items[:, 1:, None] == clicked[:, None]).any()
    if loss in ("ppo", "grpo"):
        torch.testing.assert_close(paths.log_old, log_p, atol=1e-5, rtol=1e-5)
    if g.METHODS[loss].source in ("random", "beam", "draws"):   # at the start the reference is the policy
        torch.testing.assert_close(paths.log_ref, log_p, atol=1e-5, rtol=1e-5)
    tuning.loss(history, target, 0.9).backward()
    frozen = [p for m in (tuning.old, tuning.reference, sasrec) if m is not None for p in m.parameters()]
    assert all(p.grad is None for p in frozen) and model.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", list(g.METHODS))
def test_a_setting_that_a_method_does_not_name_changes_nothing(loss):
    def value(**changes):
        torch.manual_seed(7)
        model, sasrec, catalogue, cfg, history, target = method_setting(loss=loss, beam=6, **changes)
        tuning = g.FineTuning(model, sasrec, catalogue, cfg)
        for weight in model.parameters():       # so that it is no longer its own reference
            weight.data += 0.1 * torch.randn_like(weight)
        return tuning.loss(history, target, 0.95).item()

    others = dict(lam=0.9, pool=11, share=0.5, reward="cf", scale="softmax", k=2, sampler="random",
                  easiest=1.0, hardest=9.0, confidence=False, z="scalar", smoothing=0.4, beta=0.3,
                  negatives=2, sprec_beta=0.7, group=7, clip=0.01, kl=0.5)
    groups, usual, felt = g.METHODS[loss].groups, value(), set()
    for name, other in others.items():
        group = g.Config.__dataclass_fields__[name].metadata["group"]
        if value(**{name: other}) != usual:
            assert group in groups, name
            felt.add(group)
    assert felt == set(groups)


def test_methods_at_the_policy_that_is_its_own_reference():
    def value(loss, **changes):
        torch.manual_seed(7)
        model, sasrec, *rest = method_setting(loss=loss, **changes)
        return loss_of(model, sasrec, *rest, 0.9).item()

    assert value("dpo") == pytest.approx(math.log(2), rel=1e-4)
    assert value("sdpo", negatives=5) == pytest.approx(math.log(6), rel=1e-4)
    assert value("grpo", group=6) == pytest.approx(0.0, abs=1e-4)       # ratio 1: the mean advantage is 0
    assert value("ipa", beam=6, lam=2.0) == pytest.approx(value("sft") + 2 * math.log(2), rel=1e-4)


def test_ratios_are_free_of_dropout_and_against_the_policy_that_drew():
    _, sasrec, catalogue, cfg, history, target = method_setting(loss="dpo")
    model = small_generator(catalogue, dropout=0.3).train()
    value = loss_of(model, sasrec, catalogue, cfg, history, target, 0.5).item()
    assert value == pytest.approx(math.log(2), rel=1e-4)
    tuning = g.FineTuning(model.train(), sasrec, catalogue, replace(cfg, loss="grpo", group=4))
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn_like(model.embedding.weight))
    paths = tuning.trajectories(g.METHODS["grpo"], history, target[:, None], 0.5)
    log_old = log_probs(tuning.old, catalogue, history, paths.items)[0].sum(-1)
    torch.testing.assert_close(paths.log_old, log_old)
    both = replace(cfg, loss="ipa", beam=4, lam=0.0)            # whose SFT is no ratio: it keeps its dropout
    assert len({loss_of(model.train(), sasrec, catalogue, both, history, target, 0.5).item()
                for _ in range(4)}) == 4


def test_sprec_plays_against_its_previous_iterate_and_leaves_the_clicked_item_out():
    model, sasrec, catalogue, cfg, history, target = method_setting(loss="sprec", iterations=2)
    tuning = g.FineTuning(model, sasrec, catalogue, cfg)
    sft = loss_of(model, sasrec, catalogue, replace(cfg, loss="sft"), history, target, 0.1)
    torch.testing.assert_close(tuning.loss(history, target, 0.1), sft)    # each iteration begins with SFT
    torch.testing.assert_close(tuning.loss(history, target, 0.6), sft)
    assert {tuning.loss(history, target, end).item() != sft.item() for end in (0.4, 0.5, 1.0)} == {True}
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn_like(model.embedding.weight))
    now, initial = model.state_dict(), tuning.reference.state_dict()
    tuning.refresh(9, 20)
    assert not torch.equal(tuning.reference.state_dict()["embedding.weight"], now["embedding.weight"])
    assert torch.equal(tuning.reference.state_dict()["embedding.weight"], initial["embedding.weight"])
    tuning.refresh(10, 20)                                                      # half of the training
    assert tuning.old is tuning.reference
    assert all(torch.equal(weight, now[name]) for name, weight in tuning.reference.state_dict().items())
    paths = tuning.trajectories(g.METHODS["sprec"], history, target[:, None], 0.9)._replace(
        items=torch.stack([target, torch.where(torch.arange(4) < 2, target, (target + 1) % 30)], 1))
    log_pf, log_flow, _ = g.path_log_probs(model, catalogue, catalogue.read(model, history), paths.items)
    losses = g.METHODS["sprec"].objective(paths._replace(log_pf=log_pf, log_flow=log_flow), cfg)
    assert (losses[:2] == 0).all() and (losses[2:] > 0).all()


def test_a_policy_that_draws_follows_every_eight_steps_and_the_reference_stays():
    model, sasrec, catalogue, cfg, *_ = method_setting(loss="grpo")
    tuning = g.FineTuning(model, sasrec, catalogue, cfg)
    begun = {name: weight.clone() for name, weight in model.state_dict().items()}
    caught_up = []
    for step in range(1, 25):
        with torch.no_grad():
            model.flow.weight.add_(1.0)
        tuning.refresh(step, 24)
        if torch.equal(tuning.old.flow.weight, model.flow.weight):
            caught_up.append(step)
    assert caught_up == [8, 16, 24]
    for step, refreshed in zip(range(1, 16), 7 * [False] + [True] + 6 * [False] + [True]):      # of 15 steps
        with torch.no_grad():
            model.flow.weight.add_(1.0)
        tuning.refresh(step, 15)
        assert torch.equal(tuning.old.flow.weight, model.flow.weight) == refreshed
    assert all(torch.equal(weight, begun[name]) for name, weight in tuning.reference.state_dict().items())


def test_clicked_by_identity_and_likeness_without_the_twins_code():
    model, sasrec, catalogue, cfg, history, target = method_setting(loss="ipa", beam=30)
    catalogue = catalogue._replace(semantic=2)                  # as if the last code only told twins apart

    def reward(parts):
        tuning = g.FineTuning(model, sasrec, catalogue, replace(cfg, reward=parts))
        paths = tuning.trajectories(g.METHODS["ipa"], history, target[:, None], 0.5)
        return paths.items, paths.reward

    items, aug = reward("aug")                                  # the whole catalogue, the clicked item again
    assert torch.equal(aug > 0.5, items == target[:, None]) and (aug.round().sum(1) == 2).all()
    alike = (catalogue.codes[items] == catalogue.codes[target][:, None])[..., :2].float().mean(-1)
    torch.testing.assert_close(reward("sim")[1], alike.clamp(min=1e-4))


@pytest.mark.parametrize("loss", ["ipa", "ppo", "grpo"])
def test_the_old_policy_draws_and_the_reference_judges_once_they_differ(loss):
    model, sasrec, catalogue, cfg, history, target = method_setting(loss=loss, beam=8, group=8)
    tuning, history = g.FineTuning(model, sasrec, catalogue, cfg), history[:1].expand(4, -1)
    for step in (8, 9):                                         # three policies: first, of step 8, of now
        torch.nn.init.normal_(model.embedding.weight)
        tuning.refresh(step, 80)
    torch.manual_seed(3)
    paths, draws = tuning.trajectories(g.METHODS[loss], history, target[:, None], 0.5), loss != "ipa"
    torch.manual_seed(3)
    drawn = g.beam_search(tuning.old, catalogue, catalogue.read(tuning.old, history), 8, draws)[0]
    assert torch.equal(paths.items[:, 1:], drawn) and (len(drawn.unique(dim=0)) > 1) == draws
    for policy, log_p in ((tuning.reference, paths.log_ref), *([(tuning.old, paths.log_old)] * draws)):
        own = log_probs(policy, catalogue, history, paths.items)[0].sum(-1)
        torch.testing.assert_close(log_p, own, atol=1e-5, rtol=1e-5)


def test_each_objective_is_put_on_its_own_paths():
    (reward, old, ref), log_flow, log_pf = torch.rand(3, 2, 5), torch.randn(2, 5, 3), -torch.rand(2, 5, 3)
    y = g.Paths(torch.arange(10).view(2, 5), reward, reward, log_old=old, log_ref=ref, log_pf=log_pf,
                log_flow=log_flow)
    c, p = g.Config(lam=0.5, kl=0.5, beta=0.7, sprec_beta=0.3), log_pf.sum(-1)
    d, drawn = p - ref, [x[:, 1:] for x in (p, old, ref, reward)]
    for loss, expected in {"dpo": g.dpo(d[:, 0], d[:, 1:], 0.7), "sprec": g.dpo(d[:, 0], d[:, 1:], 0.3),
                           "ipa": 0.5 * g.ipa(d[:, 1:], reward[:, 1:], 0.7),
                           "ppo": g.ppo(*drawn, log_flow[:, 0, 0], c.clip, 0.5),
                           "grpo": g.grpo(*drawn, c.clip, 0.5)}.items():
        torch.testing.assert_close(g.METHODS[loss].objective(y, c), expected)


@pytest.mark.parametrize("loss, balance", [("tb", g.trajectory_balance), ("db", g.detailed_balance)])
def test_a_scalar_z_stands_for_the_flow_at_the_root_alone(loss, balance):
    model, sasrec, catalogue, cfg, history, target = method_setting(
        loss=loss, z="scalar", sampler="none", lam=1.0, reward="aug", confidence=False)      # log R = 0
    log_pf, log_flow = log_probs(model, catalogue, history, target[:, None])
    below = catalogue.trie.flows(torch.full((1, 30), 1e-4))[0][catalogue.trie.path[target]][:, None, :-1]
    log_flow = torch.cat([torch.full((4, 1, 1), math.log(30)), (log_flow + below.log())[..., 1:]], -1)
    expected = (g.sft(log_pf) + balance(log_pf, log_flow, torch.zeros(4, 1))).mean()
    torch.testing.assert_close(loss_of(model, sasrec, catalogue, cfg, history, target, 0.5), expected)


def test_the_sft_half_of_sprec_keeps_its_dropout():
    _, sasrec, catalogue, cfg, history, target = method_setting(loss="sprec", iterations=2)
    model = small_generator(catalogue, dropout=0.3)
    assert len({loss_of(model.train(), sasrec, catalogue, cfg, history, target, 0.1).item()
                for _ in range(4)}) == 4


def method_setting(**changes):
    catalogue = small_catalogue()
    cfg = g.Config(**{**dict(loss="tb", k=3, pool=30, lam=0.5, share=1.0), **changes})
    history, target = torch.randint(30, (4, 5)), torch.randint(30, (4,))
    return small_generator(catalogue), small_sasrec(), catalogue, cfg, history, target


def loss_of(model, sasrec, catalogue, cfg, history, target, progress):
    return g.FineTuning(model, sasrec, catalogue, cfg).loss(history, target, progress)


def test_no_gradient_reaches_the_teacher_but_all_of_the_generator():
    model, sasrec, *rest = method_setting()
    loss_of(model, sasrec, *rest, 0.5).backward()
    assert all(p.grad is None for p in sasrec.parameters())
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
    assert without == {"scalar_z"}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("loss, balance", [("tb", g.trajectory_balance), ("db", g.detailed_balance)])
def test_method_loss_is_equation_7(loss, balance, share):
    model, sasrec, catalogue, cfg, history, target = method_setting(loss=loss, share=share)
    torch.manual_seed(5)
    value = loss_of(model, sasrec, catalogue, cfg, history, target, 0.3)
    with torch.no_grad():
        total = -log_probs(model, catalogue, history, target[:, None])[0].sum().item() / 4
    torch.manual_seed(5)
    torch.randperm(1)                                   # of the one end
    some = torch.randperm(4)[:round(4 * share)]         # in this order the histories get their paths
    history, target = history[some], target[some]
    tuning = g.FineTuning(model, sasrec, catalogue, cfg)
    items = tuning.trajectories(g.METHODS[loss], history, target[:, None], 0.3).items
    with torch.no_grad():
        log_pf, log_flow = log_probs(model, catalogue, history, items)
    codes = catalogue.codes.tolist()
    for b in range(len(some)):
        scores = sasrec.scores(history)[b].tolist()
        for path, item in enumerate(items[b].tolist()):
            r_cs = (scores[item] - min(scores)) / (max(scores) - min(scores))
            r_aug = float(item == target[b])
            r_sim = sum(x == y for x, y in zip(codes[item], codes[target[b]])) / 3
            log_reward = torch.tensor(math.log(max(r_aug + r_cs + r_sim, 1e-4)))
            known = [math.log(sum(max((score - min(scores)) / (max(scores) - min(scores)), 1e-4)
                                  for other, score in zip(codes, scores)
                                  if other[:level] == codes[item][:level])) for level in range(3)]
            residual = balance(log_pf[b, path], log_flow[b, path] + torch.tensor(known), log_reward).item()
            total += 0.5 * (1 - abs(r_aug - r_cs)) * residual / len(some)
    torch.testing.assert_close(value.item(), total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss, readings", [("sft", 1), ("tb", 1), ("ipa", 2), ("grpo", 1)])
def test_the_encoder_reads_a_batch_once_but_where_one_term_has_dropout_and_the_other_not(loss, readings):
    model, sasrec, catalogue, cfg, history, target = method_setting(loss=loss)
    tuning, encode, training = g.FineTuning(model.train(), sasrec, catalogue, cfg), model.encode, []
    model.encode = lambda *rows: training.append(model.training) or encode(*rows)
    tuning.loss(history, target, 0.3)
    assert len(training) == readings and training[-1] == (loss in ("sft", "tb"))


def test_ablations_change_what_they_name():
    model, sasrec, catalogue, cfg, history, target = method_setting()

    def value(**changes):
        torch.manual_seed(5)
        return loss_of(model, sasrec, catalogue, replace(cfg, **changes), history, target, 0.3).item()

    plain = g.sft(log_probs(model, catalogue, history, target[:, None])[0][:, 0]).mean().item()
    assert [value(loss="sft"), value(lam=0.0)] == pytest.approx([plain, plain])
    seen = [value()] + [value(**{name: new}) for name, new in [
        ("reward", "aug"), ("reward", "cf"), ("sampler", "random"), ("sampler", "none"),
        ("confidence", False), ("k", 2), ("lam", 0.1), ("loss", "db"), ("z", "scalar"), ("hardest", -3.0),
        ("easiest", 3.0), ("scale", "softmax"), ("loss", "smooth"), ("loss", "exact")]]
    assert len({round(x, 4) for x in seen}) == len(seen)


def test_own_codes_come_back_without_the_code_that_counts_twins(world, capsys):
    run(capsys)
    index, = (world / "runs" / "toy").glob("codes-*/toy.index.json")
    run(capsys, "--codes", str(index), "--runs-dir", "again")
    first, second = (datasets.read_kept(path) for folder in ("runs", "again")
                     for path in (world / folder / "toy").glob("codes-*/checkpoint.pt"))
    assert torch.equal(first["codes"], second["codes"]) and first["semantic"] == second["semantic"] == 2


def test_letters_own_codes_are_what_a_run_names_by_letter(world, capsys, monkeypatch):
    folder, paths = world / "data" / "Tiny", [[0, 1], [0, 0], [1, 0], [1, 1], [2, 2]]
    folder.mkdir(parents=True)
    sequences = {str(user): [(user + i) % 5 for i in range(4)] for user in range(5)}
    (folder / "Tiny.inter.json").write_text(json.dumps(sequences))
    (folder / "Tiny.item.json").write_text(json.dumps({str(i): {"title": "red"} for i in range(5)}))
    (folder / "Tiny.index.json").write_text(datasets.format_codes(torch.tensor(paths)))
    monkeypatch.setitem(datasets.DATASETS, "tiny", ("Tiny", dict.fromkeys(("inter", "item", "index"), "")))
    run(capsys, "--dataset", "tiny", "--codes", "letter", "--k", "1")
    kept, = (world / "runs" / "Tiny").glob("codes-*")
    assert datasets.read_kept(kept / "checkpoint.pt")["codes"].tolist() == paths
    before = sorted((world / "runs" / "Tiny").iterdir())
    run(capsys, "--dataset", "tiny", "--codes", str(folder / "Tiny.index.json"), "--k", "1")
    assert sorted((world / "runs" / "Tiny").iterdir()) == before           # the same, said in another way


def test_scalar_z_is_one_number_for_all_users():
    model, sasrec, *rest = method_setting(z="scalar", sampler="none", lam=1.0)
    loss_of(model, sasrec, *rest, 0.5).backward()
    assert model.scalar_z.grad != 0 and model.flow.weight.grad.abs().sum() == 0     # tb reads no other flow
    model, sasrec, *rest = method_setting(z="scalar", loss="ppo")       # whose value is its own
    loss_of(model, sasrec, *rest, 0.5).backward()
    assert model.scalar_z.grad is None and model.flow.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------- 9. training

def test_batches_hold_every_row_once_an_epoch_and_alike_lengths():
    lengths = torch.randint(1, 6, (100,))
    batches = list(datasets.length_batches(lengths, 16, 21, 0))
    assert len(batches) == 21
    for epoch in range(3):
        rows = torch.cat(batches[7 * epoch:7 * epoch + 7])
        assert sorted(rows.tolist()) == list(range(100))
    several = list(datasets.length_batches(lengths, 16, 21, 0, lengths))    # as many targets as items
    assert len(torch.cat(several).unique()) > 60 and all(lengths[rows].sum() <= 16 for rows in several)
    odd = [rows for rows in several if len(rows) != 16 // lengths[rows].max()]
    assert len(odd) <= 1                            # a length has one shape, but for what is left over
    large = datasets.length_batches(torch.tensor([9, 2, 1]), 4, 2, 0, torch.tensor([9, 2, 1]))
    assert sorted(sorted(rows.tolist()) for rows in large) == [[0], [1, 2]]
    mixed = sum(len(lengths[rows].unique()) > 1 for rows in batches[:7])
    assert mixed <= 4 and [b.tolist() for b in batches[:7]] != [b.tolist() for b in batches[7:14]]
    again, other = (list(datasets.length_batches(lengths, 16, 21, seed)) for seed in (0, 1))
    assert all(map(torch.equal, batches, again)) and not all(map(torch.equal, batches, other))


def test_rates_warm_up_and_decay_to_zero():
    model, rates = torch.nn.Linear(1, 1), []            # two groups: a rate of each goes its own way down
    optimiser = torch.optim.SGD([{"params": model.weight, "lr": 5.0}, {"params": model.bias, "lr": 0.5}])
    rows = iter([torch.zeros(1)] * 40)
    g.fit(model, "x", lambda rows, _: model(torch.ones(1, 1)).sum(), rows, 40, optimiser,
          datasets.Journal(), after=lambda step: rates.append([x["lr"] for x in optimiser.param_groups]))
    ten_fold, rates = zip(*rates)
    assert ten_fold == pytest.approx([10 * rate for rate in rates])
    assert [rates[0], rates[20], rates[39]] == pytest.approx([0.25, 0.25, 0.5 * math.sin(math.pi / 80) ** 2])
    assert max(rates) == max(rates[1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_are_clipped_to_a_norm_of_one_once_they_are_unscaled(monkeypatch, dtype):
    seen, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, most: seen.append(
        (clip(weights := [*weights], most).item(), weights[0].grad.item())))
    model = torch.nn.Linear(1, 1, bias=False)
    optimiser = torch.optim.AdamW(model.parameters(), 0.1)
    g.fit(model, "x", lambda rows, at: (0.25 if at < 1 else 4.0) * model.weight.sum(),
          iter([torch.zeros(1)] * 2), 2, optimiser, datasets.Journal(), dtype)
    assert seen == [pytest.approx((0.25, 0.25)), pytest.approx((4.0, 1.0))]


def test_rates_are_relative_to_the_size_of_a_weight():
    model = torch.nn.Sequential(torch.nn.Embedding(500, 8), torch.nn.Linear(8, 500), torch.nn.LayerNorm(500))
    torch.nn.init.normal_(model[1].weight, std=0.05)
    before = [weight.detach().clone() for weight in model.parameters()]
    optimiser = datasets.relative_adamw(model, 0.01, weight_decay=0.0)
    sum((weight * torch.randn_like(weight)).sum() for weight in model.parameters()).backward()
    optimiser.step()                    # Adam's first step goes by its rate, whatever the gradient's size
    for weight, start in zip(model.parameters(), before):
        size = max(1e-3, start.square().mean().sqrt().item())
        assert (weight - start).abs().mean().item() == pytest.approx(0.01 * size, rel=0.1)
    assert sum(len(group["params"]) for group in optimiser.param_groups) == 5


def line_fit(**options):
    """Fit y = 3 x by gradient descent; returns the model and what was logged."""
    model, x, entries = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 32)[:, None], []
    journal = datasets.Journal()
    journal.log = entries.append
    g.fit(model, "line", lambda rows, _: (model(x[rows]) - 3 * x[rows]).square().mean(),
          datasets.length_batches(torch.zeros(32), 8, 200, 0), 200, torch.optim.Adam(model.parameters(), 0.1),
          journal, **options)
    return model, entries


def test_fit_learns_and_keeps_the_last_state_without_validation():
    model, entries = line_fit()
    assert abs(model.weight.item() - 3) < 0.05
    assert [e["step"] for e in entries] == [50, 100, 150, 200] and entries[-1]["loss"] < entries[0]["loss"]


def test_fit_ends_with_the_state_of_the_best_validation():
    scores, seen, steps = iter([0.1, 0.7, 0.2, 0.3]), [], []
    model = torch.nn.Linear(1, 1)

    def validate():
        seen.append(model.weight.detach().clone())
        return {"N@10": next(scores)}

    g.fit(model, "x", lambda rows, _: model(torch.ones(4, 1)).sum(),
          datasets.length_batches(torch.zeros(8), 4, 8, 0), 8, torch.optim.Adam(model.parameters(), 0.1),
          datasets.Journal(), evaluations=4, validate=validate, after=steps.append)
    assert len(seen) == 4 and torch.equal(model.weight, seen[1]) and steps == list(range(1, 9))


def test_fit_stops_at_a_loss_that_is_not_finite(tmp_path):
    def bad(model, journal):
        with journal:
            g.fit(model, "bad",
                  lambda rows, at: model(torch.ones(1, 1)).sum() * (math.nan if at > 0.9 else 1),
                  datasets.length_batches(torch.zeros(8), 4, 10, 0), 10,
                  torch.optim.Adam(model.parameters(), 0.1), journal)

    with pytest.raises(DataError, match=r"bad: the loss is nan at step 10 of 10; .* \(nothing of it is kept"):
        bad(torch.nn.Linear(1, 1), datasets.Journal())
    journal = datasets.Journal(tmp_path, every=0.0)
    with pytest.raises(DataError, match=r"step 10 .* \(its state of before is in .*snapshot.pt"):
        bad(torch.nn.Linear(1, 1), journal)
    found = datasets.read_kept(journal.snapshot)
    assert found["step"] == 9 and found["parts"]["model"]["weight"].isfinite().all()


def test_overflow_in_fp16_is_skipped_and_counted():
    model, entries, journal = torch.nn.Linear(1, 1), [], datasets.Journal()
    journal.log = entries.append
    g.fit(model, "x",
          lambda rows, at: (model(torch.ones(1, 1)) - 3).square().mean() * (1e38 if at < 0.05 else 1),
          iter([torch.zeros(1)] * 100), 100, torch.optim.AdamW(model.parameters(), 0.3, fused=True), journal,
          torch.float16)
    assert entries[-1]["skipped for overflow in fp16"] == 4 and entries[-1]["loss"] < 0.1


def test_a_loss_that_overflows_in_fp16_is_skipped_until_the_scale_is_used_up():
    def fit(broken_until):
        model, entries, journal = torch.nn.Linear(1, 1), [], datasets.Journal()
        journal.log = entries.append
        g.fit(model, "x", lambda rows, at: model(torch.ones(1, 1)).square().mean() * (
                  math.inf if at <= broken_until else 1),
              iter([torch.zeros(1)] * 100), 100, torch.optim.AdamW(model.parameters(), 0.3, fused=True),
              journal, torch.float16, evaluations=20, validate=lambda: {"N@10": 0.1})
        return entries

    entries = fit(0.1)                  # two of these ten steps are validated
    assert [entry["step"] for entry in entries[:2]] == [5, 10] and "loss" not in entries[0]
    assert entries[-1]["skipped for overflow in fp16"] == 10 and entries[-1]["loss"] < 0.1
    with pytest.raises(DataError, match="x: the loss is inf at step 20 of 100"):
        fit(1.0)                        # 65,536 has been halved to less than 1 after 17 steps


def test_precision_is_what_the_device_can_do():
    cpu = torch.device("cpu")
    assert datasets.compute_type(cpu, "auto") in (torch.bfloat16, torch.float32)
    assert datasets.compute_type(cpu, "fp32") == torch.float32
    assert datasets.compute_type(cpu, "bf16") == torch.bfloat16
    with pytest.raises(DataError, match="needs a GPU"):
        datasets.compute_type(cpu, "fp16")


def test_a_gpu_is_taken_where_there_is_one(monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(
        torch.cuda._utils._get_device_index(device)))               # torch refuses one without an index
    assert [str(datasets.choose_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] \
        == ["cuda", "cpu", "cuda", "cuda:1"] and taken == [1]
    with pytest.raises(DataError, match="cuda:2: torch sees no such device"):
        datasets.choose_device("cuda:2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match="3 processes need as many GPUs, and torch sees 2"):
        datasets.choose_device("auto")                      # all fail alike, before they wait for each other
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(DataError, match="need a torch with NCCL"):
        datasets.choose_device("auto")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(DataError, match="LOCAL_RANK, which names each process's GPU, is not set"):
        datasets.choose_device("auto")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(DataError, match="did not find each other .*RANK.*; start them by torchrun"):
        datasets.choose_device("cpu")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "1")                     # without the first one's address
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DataError, match="did not find each other"):
        datasets.choose_device("cpu")
    assert capsys.readouterr().err.startswith("error: the processes did not find each other")


@pytest.mark.parametrize("backend, error, leaves", [
    ("gloo", None, True), ("gloo", DataError("bad"), True), ("cpu:gloo,cuda:nccl", None, True),
    ("cpu:gloo,cuda:nccl", DataError("bad"), False), ("cpu:gloo,cuda:nccl", KeyError("a bug"), False),
    ("cpu:gloo,cuda:nccl", datasets.Stopped(15), True), ("cpu:gloo,cuda:nccl", KeyboardInterrupt(), False)])
def test_a_process_takes_leave_of_a_gpus_group_only_with_the_others(monkeypatch, backend, error, leaves):
    left = []                               # NCCL's farewell waits for all, and one that failed leaves alone
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: left.append(True))

    def command():
        if error:
            raise error
        return "done"

    with pytest.raises(KeyError) if isinstance(error, KeyError) else contextlib.nullcontext():
        assert datasets.guarded(command) == {DataError: 1, datasets.Stopped: 143, KeyboardInterrupt: 130}.get(
            type(error), 0)
    assert bool(left) == leaves


@pytest.mark.parametrize("loss, encoder", [("tb", "full"), *((loss, "causal") for loss in g.METHODS)])
def test_a_step_and_a_search_never_ask_their_device_for_a_number(monkeypatch, loss, encoder):
    """By tensors without values, which refuse that, and operands on another device: a GPU need not wait."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    device, catalogue, causal = torch.device("meta"), small_catalogue(), encoder == "causal"
    for name, value in vars(catalogue.trie).items():
        setattr(catalogue.trie, name, value.to(device) if isinstance(value, torch.Tensor) else value)
    model = small_generator(catalogue, causal=causal, dropout=0.1).to(device).train()
    catalogue = catalogue._replace(codes=catalogue.codes.to(device), tokens=catalogue.tokens.to(device))
    sasrec, pairs = small_sasrec().to(device), datasets.split(small_world(n_items=30), 8)["train"].to(device)
    history, target = (pairs.windows(8) if causal else pairs).batch(torch.arange(6))
    tuning = g.FineTuning(model, sasrec, catalogue, g.Config(loss=loss, pool=20))
    for progress in (0.05, 0.5):
        if loss != "sprec":                 # which decides by it, and so is not recorded as a graph
            progress = torch.full((), progress, device=device)
        value = tuning.loss(history, target, progress)
        value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), 0.1, fused=False).step()
    items, score = g.beam_search(model.eval(), catalogue, catalogue.read(model, history), 20)
    ranks = [sasrec.loss(history, target if causal else history, pool) for pool in (20, 50)]
    assert {x.device for x in (value, items, score, *ranks)} == {device}


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def a_fine_tuning(device, dropout=0.1, **settings):
    """A method at work on a device, and rows of its batches in two shapes."""
    catalogue, pairs = small_catalogue(), datasets.split(small_world(n_items=30), 8)["train"].windows(8)
    model = small_generator(catalogue, causal=True, dropout=dropout).to(device).train()
    catalogue = g.Catalogue.of(catalogue.codes.to(device), catalogue.semantic)
    tuning = g.FineTuning(model, small_sasrec().to(device), catalogue, g.Config(pool=20, **settings))
    return tuning, [pairs.to(device).batch(torch.arange(n)) for n in (6, 30)]


def loss_and_gradients(loss, model, batch, progress, seed=3):
    torch.manual_seed(seed)
    model.zero_grad()
    value = loss(*batch, progress)
    value.backward()
    gradients = ((weight, weight.grad) for weight in model.parameters())
    return [value.detach().clone()] + [torch.zeros_like(weight) if gradient is None else gradient.clone()
                                       for weight, gradient in gradients]


@on_cuda
@pytest.mark.parametrize("loss", [loss for loss in g.METHODS if loss != "sprec"])
def test_a_cuda_graph_replays_the_loss_and_its_gradients(loss):
    tuning, batches = a_fine_tuning("cuda", loss=loss)
    replay = datasets.graphed(tuning.model, tuning.loss)
    assert isinstance(replay, datasets.Graphs)
    for batch in batches:
        replay(*batch, 0.5)                                             # records it
    for progress, batch in itertools.product((0.2, 0.9), batches):      # the same random numbers in both
        with torch.no_grad():
            tuning.model.embedding.weight.mul_(1.2)         # a weight is read whenever the graph is replayed
        expected = loss_and_gradients(tuning.loss, tuning.model.train(), batch, progress)
        found = loss_and_gradients(replay, tuning.model.train(), batch, progress)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert set(replay.recorded) == {tuple(x.shape for x in (*batch, torch.ones(()))) for batch in batches}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_shape_is_recorded_once(monkeypatch, dtype):
    """By a stand-in for torch's recording: as there, the first inputs stay and take in those that follow."""
    model, seen, kept = torch.nn.Linear(4, 1), [], []

    def loss_of(x, y, progress):
        seen.append((x.shape, model.training, torch.is_autocast_enabled("cpu"),
                     torch.is_autocast_cache_enabled(), torch.is_tensor(progress)))
        model.eval()                                            # as the losses that compare policies do
        kept.append((model(x) - y).square().mean() * (1 + progress))
        return kept[-1]

    def record(step, inputs, num_warmup_iters, allow_unused_input, pool):
        assert not torch.is_autocast_enabled("cpu") and set(step.parameters()) == set(model.parameters())
        for _ in range(num_warmup_iters + 1):
            torch.autograd.grad(step(*inputs), model.weight)

        def replay(*arguments):
            for static, new in zip(inputs, arguments):
                static.copy_(new)
            return (model(inputs[0]) - inputs[1]).square().mean() * (1 + inputs[2])

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    graphs = datasets.Graphs(model, loss_of, dtype)
    for n, progress in ((3, 0.0), (3, 0.5), (5, 0.5), (3, 0.25), (5, 1.0)):
        x, y = torch.randn(n, 4), torch.randn(n, 1)
        expected = (model(x) - y).square().mean() * (1 + progress)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):      # as in `fit`
            torch.testing.assert_close(graphs(x, y, progress), expected, atol=0.1 * (dtype != torch.float32),
                                       rtol=1e-5)
    mixed = dtype == torch.bfloat16
    assert seen == [(torch.Size([n, 4]), True, mixed, False, True) for n in (3, 3, 5, 5)]
    assert all(loss.grad_fn is None for loss in kept)           # no node of a recording stays with a weight
    assert datasets.graphed(model, loss_of) is loss_of          # on a CPU


@on_cuda
@pytest.mark.parametrize("loss", ["sft", "tb", "db", "smooth", "exact"])
def test_a_gpu_computes_what_a_cpu_does(loss):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        tuning, batches = a_fine_tuning(device, dropout=0.0, loss=loss, sampler="none", share=1.0)
        losses = loss_and_gradients(tuning.loss, tuning.model, batches[1], 0.5)
        memory = tuning.catalogue.read(tuning.model, batches[1][0])
        searched = g.beam_search(tuning.model, tuning.catalogue, memory, 10)
        found.append([*losses, *searched, tuning.sasrec.loss(*batches[1], 50)])
    for on_cpu, on_gpu in zip(*found):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-4, rtol=1e-3)


@on_cuda
@pytest.mark.parametrize("flags", [
    ["--loss=tb"], ["--loss=sprec"], ["--loss=grpo", "--backbone=letter"], ["--loss=ipa", "--precision=fp32"],
    ["--loss=db", "--precision=fp16"], ["--loss=tb", "--encoder=full"], ["--loss=exact", "--from-scratch"]])
def test_all_stages_run_on_a_gpu(world, capsys, flags):
    out = run(capsys, "--device=cuda", *flags).out
    assert "; cuda, " in out and "R@10" in out
    again = run(capsys, "--device=cuda", *flags).out
    assert again.count("kept from before") == 4 and table(again) == table(out)


def test_bf16_is_close_to_float32():
    model, sasrec, *rest = method_setting()
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            values.append(loss_of(model, sasrec, *rest, 0.5).item())
    assert values[1] != values[0] and values[1] == pytest.approx(values[0], rel=0.03)


# ----------------------------------------------------------------------------------- 10. decoding, metrics

@pytest.mark.parametrize("levels, width", [(3, 4), (2, 6), (4, 3)])
def test_a_wide_beam_equals_brute_force(levels, width):
    catalogue = small_catalogue(levels=levels, width=width)
    model, history = small_generator(catalogue), torch.randint(30, (5, 6))
    history[2, 4:] = 30
    log_pf, _ = log_probs(model, catalogue, history, torch.arange(30).expand(5, -1))
    log_prob, order = log_pf.sum(-1).sort(descending=True)
    items, found = g.beam_search(model, catalogue, catalogue.read(model, history), 30)
    assert torch.equal(items, order)
    torch.testing.assert_close(found, log_prob.detach(), atol=1e-5, rtol=1e-5)


def test_a_narrow_beam_finds_real_items_with_their_true_probability():
    catalogue = small_catalogue()
    model, history = small_generator(catalogue), torch.randint(30, (5, 6))
    items, found = g.beam_search(model, catalogue, catalogue.read(model, history), 4)
    log_pf, _ = log_probs(model, catalogue, history, items)
    torch.testing.assert_close(found, log_pf.sum(-1).detach(), atol=1e-5, rtol=1e-5)
    assert all(len(set(row)) == 4 for row in items.tolist()) and (found.diff() <= 0).all()


def test_a_beam_wider_than_the_catalogue_is_filled_up():
    catalogue = small_catalogue(n_items=6)
    model = small_generator(catalogue)
    items, found = g.beam_search(model, catalogue, catalogue.read(model, torch.tensor([[0], [1]])), 9)
    assert all(sorted(row) == [0, 1, 2, 3, 4, 5, 6, 6, 6] for row in items.tolist())
    assert (found[:, 6:] == -torch.inf).all() and (found[:, :6] > -torch.inf).all()


def test_metrics_by_hand():
    recommended = torch.arange(20).repeat(4, 1)
    metrics = g.ranking_metrics(recommended, torch.tensor([0, 3, 11, 99]))           # ranks 1, 4, 12, none
    assert metrics == pytest.approx({"R@1": 1 / 4, "R@5": 2 / 4, "R@10": 2 / 4, "R@20": 3 / 4,
                                     "N@5": (1 + 1 / math.log2(5)) / 4, "N@10": (1 + 1 / math.log2(5)) / 4,
                                     "N@20": (1 + 1 / math.log2(5) + 1 / math.log2(13)) / 4})


def test_liked_but_unseen_by_hand():
    liked = torch.zeros(2, 30, dtype=torch.bool)
    liked[0, [0, 1, 2]] = liked[1, [12]] = True
    clicked, offsets = torch.tensor([0, 5, 6, 7, 8, 9]), torch.tensor([0, 3, 6])
    data = datasets.Data("x", [""] * 30, [""] * 30, clicked, offsets, liked, "")
    assert datasets.liked_unseen(torch.arange(20).repeat(2, 1), data) == 1.0    # 1 and 2 of user 0, else none


def test_diversity_by_hand():
    clicked, offsets = torch.tensor([3, 3, 3, 2, 2, 1, 0, 1, 2]), torch.tensor([0, 5, 9])
    data = datasets.Data("x", [""] * 20, [""] * 20, clicked, offsets, None, "")  # popularity: 3, then 0 .. 2
    recommended = torch.tensor([[3] * 10, [3] * 5 + [19] * 5])
    r_cs = torch.tensor([[0.5] * 10, [0.0] * 5 + [1.0] * 5])
    figures = datasets.diversity(recommended, r_cs, data)
    assert figures["coverage"] == 2 / 20 and figures["r_cs mean"] == 0.5
    assert figures["KL"] == pytest.approx(0.75 * math.log(0.75 * 20) + 0.25 * math.log(0.25 * 20))
    assert figures["std"] == pytest.approx(np.std([15, 5] + [0] * 18))
    assert figures["r_cs range"] == 0.5 and figures["r_cs std"] == pytest.approx(0.25)
    assert figures["rank"] == pytest.approx(0.75 * 1 + 0.25 * 20)
    even = datasets.diversity(torch.arange(20).view(2, 10), r_cs, data)
    assert even["coverage"] == 1 and even["KL"] == pytest.approx(0) and even["std"] == pytest.approx(0)


# -------------------------------------------------------------------------------------- 11. the whole road

QUICK = ["--code-epochs", "20", "--levels", "2", "--codebook-size", "8", "--sasrec-epochs", "2",
         "--sasrec-dim", "16", "--d-model", "16", "--heads", "2", "--d-kv", "8", "--d-ff", "32",
         "--layers", "1", "--batch", "64", "--sft-epochs", "1", "--finetune-epochs", "1",
         "--evaluations", "2", "--vector-dim", "8", "--device", "cpu"]


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A toy world small enough to run the whole road within a second or two, in a folder of its own."""
    small = functools.partial(datasets.toy, n_users=60, n_items=50, n_categories=5, n_brands=4)
    monkeypatch.setattr(datasets, "toy", small)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *flags, expect=0):
    assert g.main([*QUICK, *flags]) == expect
    return capsys.readouterr()


def table(text):
    """The result table without its seconds."""
    rows = ("popularity", "SASRec", "SFT", "then")
    return [line.split()[:-1] for line in text.splitlines() if line.startswith(rows)]


@pytest.mark.parametrize("backbone", ["tiger", "letter"])
@pytest.mark.parametrize("loss", list(g.METHODS))
def test_every_method_and_backbone_runs_end_to_end(world, capsys, loss, backbone):
    out = run(capsys, "--loss", loss, "--backbone", backbone, "--group", "4").out
    assert [row[0] for row in table(out)] == ["popularity", "SASRec", "SFT", "then"] and f"then {loss}" in out
    assert "overlap with the 10 nearest items of SASRec" in out


def test_a_run_repeats_itself_and_stages_are_kept(world, capsys):
    first = run(capsys, "--loss", "tb").out
    kept = run(capsys, "--loss", "tb").out
    assert table(first) == table(kept) and kept.count("kept from before") == 4
    other = run(capsys, "--loss", "db").out
    assert other.count("kept from before") == 3 and other.count("now kept") == 1
    fresh = run(capsys, "--loss", "tb", "--runs-dir", "again").out
    assert table(fresh) == table(first)                    # same seed, same table
    folder, = (world / "runs" / "toy").glob("tb-*")
    assert files_under(folder) == [".lock", "checkpoint.pt", "config.json", "metrics.jsonl"]
    assert json.loads((folder / "config.json").read_text())["lam"] == 0.01
    codes, = (world / "runs" / "toy").glob("codes-*/toy.index.json")
    assert datasets.read_codes(codes, 50).shape == (50, 3)


def test_seeds_run_one_after_another_and_end_in_mean_and_spread(world, capsys):
    single = [table(run(capsys, "--seed", seed).out) for seed in ("1", "2", "3")]
    out = run(capsys, "--seeds", "1,2,3").out
    assert out.count("kept from before") == 12 and out.count("seed ") == 3      # the same runs, found again
    parts = out[out.index("test, n = 3"):].replace(" ± ", "±").splitlines()
    assert [line.split()[0] for line in parts[1:-1]] == ["popularity", "SASRec", "SFT", "then"]
    assert re.match(r"180 users of 3 runs, then tb less SFT: R@10 [+-]0", parts[-1])
    for line, *rows in zip(parts[1:-1], *single):
        words = line.removeprefix("then").split()[1:]
        for word, *cells in zip(words[:7], *(row[2 if row[0] == "then" else 1:] for row in rows)):
            mean, spread = map(float, word.split("±"))
            values = list(map(float, cells))
            assert len(values) == 3 and mean == pytest.approx(np.mean(values), abs=2e-4)
            assert spread == pytest.approx(np.std(values, ddof=1), abs=2e-4)
    report = run(capsys, "--seeds", "1,2,3", "--report").out
    assert report.count("## toy") == 1 and re.search(r"[|] tb [|] .* ± .*[|] 3 [|]", report)
    for wrong in ("1", "1,x", "1,,2", "-1,2"):
        assert "is not a list of two or more" in run(capsys, f"--seeds={wrong}", expect=1).err
    assert "choose one" in run(capsys, "--seeds", "1,2", "--finetune-seeds", "1,2", expect=1).err
    assert "names a seed twice" in run(capsys, "--seeds", "1,2,1", expect=1).err
    assert "names a seed twice" in run(capsys, "--seeds", "42,042", expect=1).err


@pytest.mark.parametrize("same_users", (True, False))
def test_the_difference_from_sft_is_taken_user_by_user(same_users):
    torch.manual_seed(0)
    runs, users = [], {}            # user -> the differences that belong to one number of its own
    for index in range(3):
        taken = torch.arange(40) % 12 + (0 if same_users else index)
        lists = {name: torch.stack([torch.randperm(15)[:12] for _ in taken])
                 for name in ("SASRec", "SFT", "then db")}
        runs.append({"popularity": {"taken": taken}, **{name: {"top": top} for name, top in lists.items()}})
        for user, item in enumerate(taken.tolist()):
            ranks = [row.index(item) if item in row else 99 for row in
                     (lists[name][user].tolist()[:10] for name in ("SFT", "then db"))]
            found = [(float(rank < 10), math.log(2) / math.log(rank + 2) * (rank < 10)) for rank in ranks]
            users.setdefault(user if same_users else (index, user), []).append(
                [after - before for before, after in zip(*found)])
    numbers = np.array([np.mean(differences, axis=0) for differences in users.values()])
    recall, ndcg = (f"{mean:+.4f} ± {spread / len(numbers) ** 0.5:.4f}"
                    for mean, spread in zip(numbers.mean(0), numbers.std(0, ddof=1)))
    users = "the same 40 users, mean of 3 runs" if same_users else "120 users of 3 runs"
    assert datasets.less_sft(runs) == (
        f"{users}, then db less SFT: R@10 {recall}, N@10 {ndcg} (standard error)")
    assert datasets.less_sft(runs[:1]).startswith("the same 40 users, then db less SFT: R@10 ")


def test_more_sft_stands_beside_a_method_where_it_is_kept(world, capsys):
    def rows(out):
        return {row[0] + " " + row[1] if row[0] in ("then", "only") else row[0]: row for row in table(out)}

    assert "then sft" not in rows(run(capsys, "--loss", "tb").out)                  # nothing is kept yet
    more = run(capsys, "--loss", "sft").out
    assert list(rows(more)) == ["popularity", "SASRec", "SFT", "then sft"] and "less then sft" not in more
    out = run(capsys, "--loss", "tb", "--reward", "aug").out
    assert list(rows(out)) == ["popularity", "SASRec", "SFT", "then sft", "then tb"]
    assert rows(out)["then sft"] == rows(more)["then sft"]
    recall = {label: float(row[4] if " " in label else row[3]) for label, row in rows(out).items()}
    differences = dict(re.findall(r"then tb less (.+?): R@10 (\S+)", out))
    assert {label: float(found) for label, found in differences.items()} == pytest.approx(
        {label: recall["then tb"] - recall[label] for label in ("SFT", "then sft")}, abs=2e-4)
    run(capsys, "--loss", "sft", "--seed", "43")
    several = run(capsys, "--loss", "tb", "--seeds", "42,43").out.splitlines()[-2:]
    assert ["SFT", "then sft"] == [re.match("120 users of 2 runs, then tb less (.+?):", line)[1]
                                   for line in several]                             # two seeds, two worlds
    assert "less then sft" not in run(capsys, "--loss", "tb", "--seeds", "42,44").out.splitlines()[-1]
    for other in (["--finetune-epochs", "2"], ["--from-scratch"], ["--seed", "45"], ["--sft-epochs", "2"]):
        assert "less then sft" not in run(capsys, "--loss", "tb", *other).out
    run(capsys, "--from-scratch", "--loss", "sft")
    assert "only tb less only sft" in run(capsys, "--from-scratch", "--loss", "tb").out
    paths = sorted((world / "runs" / "toy").glob("sft-*/checkpoint.pt"))
    for path in paths:                  # of another SFT: the row is left out, and what is kept stays there
        kept = torch.load(path, weights_only=True)
        if kept["before"].get("sft"):
            torch.save({**kept, "before": {**kept["before"], "sft": "another"}}, path)
    found = run(capsys, "--loss", "tb")
    assert "then sft" not in rows(found.out)
    assert re.fullmatch("warning: .*checkpoint.pt was made from other codes or models .*; it is left out\n",
                        found.err)
    assert sorted((world / "runs" / "toy").glob("sft-*/checkpoint.pt")) == paths


def test_finetune_seeds_share_one_sft(world, capsys):
    run(capsys, "--from-scratch")
    out = run(capsys, "--from-scratch", "--finetune-seeds", "42,7").out
    kept = [line for line in out.splitlines() if "kept" in line]
    assert [line.split()[0] for line in kept if "now kept" in line] == ["finetune"]     # 42 is what had run
    assert "seed 42 (7 for the fine-tuning)" in out
    folders = [*(world / "runs" / "toy").glob("tb-*")]
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in folders]
    assert len(folders) == 2 and len([*(world / "runs" / "toy").glob("sft-*")]) == 1
    assert any(not torch.equal(state, states[1][name]) for name, state in states[0].items())
    means = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test"]["R@10"]
             for folder in folders]
    row, = re.findall(r"[|] tiger [|] tb [|].*", run(capsys, "--report").out)
    assert row.split(" | ")[3] == f"{np.mean(means):.4f}" and row.endswith("| 1 |")     # of one seed


def test_only_what_depends_on_a_setting_is_done_again(world, capsys):
    run(capsys)
    for flags, stages in [(["--k", "3"], {"finetune"}), (["--beta", "2"], set()),
                          (["--temperature", "0.9"], set()),
                          (["--sasrec-epochs", "1"], {"sasrec", "finetune"}),
                          (["--lr", "0.03"], {"sft", "finetune"}),
                          (["--softmax", "all"], {"sft", "finetune"}),
                          (["--commitment", "0.5"], {"codes", "sft", "finetune"})]:
        lines = [line.split() for line in run(capsys, *flags).out.splitlines() if " in runs" in line]
        assert {line[0] for line in lines if "now" in line} == stages


@pytest.mark.parametrize("loss, z, unused", [
    ("sft", "user", {"flow.weight", "scalar_z"}), ("sprec", "user", {"flow.weight", "scalar_z"}),
    ("tb", "user", {"scalar_z"}), ("ppo", "user", {"scalar_z"}), ("db", "scalar", set())])
def test_several_processes_look_for_unused_weights_once(monkeypatch, loss, z, unused):
    monkeypatch.setattr(datasets, "processes", lambda: (0, 2))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda step: step)
    catalogue, (history, target) = small_catalogue(), rows_of_histories()
    model = small_generator(catalogue, causal=True)
    tuning = g.FineTuning(model, small_sasrec(), catalogue, g.Config(loss=loss, z=z, pool=30, group=4))
    datasets.data_parallel(model, lambda rows, progress: tuning.loss(history[rows], target[rows], progress),
                           (target < 30).sum(1))
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == unused


def write_world(folder, data):
    """A dataset as the two files of a user."""
    folder.mkdir()
    ends = data.offsets.tolist()
    sequences = {str(u): data.items[a:b].tolist() for u, (a, b) in enumerate(zip(ends, ends[1:]))}
    (folder / f"{folder.name}.inter.json").write_text(json.dumps(sequences))
    (folder / f"{folder.name}.item.json").write_text(
        json.dumps({str(i): {"title": text} for i, text in enumerate(data.texts)}))


def command(folder, *flags, processes=0, script=HERE / "gflowgr.py"):
    """The command as a user gives it, in `folder`, alone or by torchrun; returns what came of it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(torchrun if processes else []), str(script), *QUICK, *flags]
    return subprocess.run(words, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=300)


def test_two_processes_give_the_losses_of_one(tmp_path):
    write_world(tmp_path / "Small", small_world())
    flags = ["--dataset", "Small", "--device", "cpu", "--precision", "fp32", "--loss", "sft",
             "--dropout", "0", "--sasrec-dropout", "0", "--batch", "17", "--finetune-epochs", "2"]
    (tmp_path / "threads.py").write_text(f"""
import pathlib, sys
sys.path.insert(0, {str(HERE)!r})
import gflowgr
code = gflowgr.main()
print(*[name.read_text() for name in pathlib.Path("/proc/self/task").glob("*/comm")], file=sys.stderr)
sys.exit(code)""")
    alone = command(tmp_path, *flags, "--runs-dir", "one")
    both = command(tmp_path, *flags, "--runs-dir", "two", processes=2, script=tmp_path / "threads.py")
    assert alone.returncode == both.returncode == 0, both.stderr
    assert "gloo_" not in both.stderr       # a thread of the group's that outlives it now and then aborts
    assert both.stdout.count("Small: 60 users") == 1 and "2 processes" in both.stdout   # one speaks
    found = []
    for runs in ("one", "two"):
        folders = sorted((tmp_path / runs / "Small").iterdir())
        found.append({folder.name: [json.loads(line) for line in (folder / "metrics.jsonl").open()]
                      for folder in folders})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 5
    for stage in found[0]:
        for one, two in zip(found[0][stage], found[1][stage], strict=True):
            assert one.get("loss", 0) == pytest.approx(two.get("loss", 0), rel=1e-4)
            if stage.startswith("sft"):
                assert one.get("valid") == pytest.approx(two.get("valid")) and one.keys() == two.keys()
    again = command(tmp_path, *flags, "--runs-dir", "two", processes=2)
    assert again.stdout.count("kept from before") == 4 and table(again.stdout) == table(both.stdout)


def test_each_machine_speaks_of_its_input_once(monkeypatch, capsys):
    def command():
        raise DataError("no such file")

    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, local in (("0", "0"), ("1", "1"), ("2", "0"), ("3", "1")):        # two machines
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", local)
        assert datasets.guarded(command) == 1
        assert capsys.readouterr().err == "error: no such file\n" * (local == "0")
    monkeypatch.delenv("WORLD_SIZE")
    assert datasets.processes() == (0, 1)                   # a RANK alone is left over from something else


def test_several_processes_report_a_mistake_once(tmp_path):
    result = command(tmp_path, "--dataset", "nowhere", processes=2)
    assert result.returncode == 1 and result.stderr.count("unknown dataset 'nowhere'") == 1


def test_all_processes_stop_together_whoever_is_told(tmp_path):
    write_world(tmp_path / "Small", small_world())
    flags = [*SMALL, "--save-every", "1000", "--sft-epochs", "300"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    both = [started(tmp_path, *flags, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                    MASTER_ADDR="localhost", MASTER_PORT=port) for rank in "01"]
    wait_for(lambda: any(notes.stat().st_size for notes in tmp_path.glob("runs/*/sft-*/metrics.jsonl")),
             both[0])
    both[1].send_signal(signal.SIGTERM)
    for process in both:
        assert process.communicate(timeout=60) and process.returncode == 143
    assert len(list(tmp_path.glob("runs/*/sft-*/snapshot.pt"))) == 1


def test_a_missing_compiler_is_said(world, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", {"clang++": "/bin/clang++", "cl": "cl.exe"}.get)
    flags = ["--compile", "--device", "cpu"]
    monkeypatch.delenv("CXX", raising=False)
    assert "--compile needs a compiler, and g++ is not on" in run(capsys, *flags, expect=1).err
    monkeypatch.setenv("CXX", "icpx")                           # torch then asks for no other
    assert "a compiler, and icpx is not on" in run(capsys, *flags, expect=1).err
    monkeypatch.setenv("CXX", "clang++")
    datasets.check_compiler(torch.device("cpu"))
    monkeypatch.delenv("CXX")
    for system in ("darwin", "win32"):
        monkeypatch.setattr(sys, "platform", system)
        datasets.check_compiler(torch.device("cpu"))
    monkeypatch.delenv("CC", raising=False)                     # a GPU's needs a C compiler beside triton
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: name)
    datasets.check_compiler(torch.device("cuda"))               # on Windows that is triton's own
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(DataError, match="a compiler, and gcc or clang is not on the PATH; .* in CC"):
        datasets.check_compiler(torch.device("cuda"))


def test_a_catalogue_of_fewer_items_than_a_list_is_ranked_whole(world, capsys):
    own = world / "Own"
    own.mkdir()
    (own / "Own.item.json").write_text(json.dumps({str(i): {"title": f"thing {i % 4}"} for i in range(12)}))
    sequences = {str(u): [(u + 5 * i) % 12 for i in range(5)] for u in range(9)}
    (own / "Own.inter.json").write_text(json.dumps(sequences))
    flags = ["--dataset", str(own), "--max-history", "3", "--sasrec-length", "2", "--k", "2"]
    assert [row[4] for row in table(run(capsys, *flags).out)[:2]] == ["1.0000", "1.0000"]      # R@20
    (own / "Own.inter.json").write_text('{"0": [0, 1, 2]}')
    assert "no user has the 4 interactions" in run(capsys, *flags, expect=1).err


def test_bad_files_are_found_before_anything_is_trained(world, capsys):
    (world / "bad.npy").write_text("no array")
    for flags, words in ((["--codes", "none.json"], "none.json does not exist"),
                         (["--item-vectors", "bad.npy"], "bad.npy is not a .npy file of numbers, as numpy")):
        found = run(capsys, *flags, expect=1)
        assert words in found.err and "unsafely" not in found.err and not (world / "runs").exists()


def test_own_codes_vectors_and_from_scratch(world, capsys):
    codes = torch.tensor(list(itertools.product(range(4), repeat=3)))[:50]
    codes[1] = codes[0]                                    # twins get a last code
    (world / "own.json").write_text(datasets.format_codes(codes))
    np.save(world / "own.npy", np.random.default_rng(0).normal(size=(50, 5)))
    assert "only tb" in run(capsys, "--codes", "own.json", "--from-scratch").out
    assert "then tb" in run(capsys, "--item-vectors", "own.npy", "--z", "scalar", "--no-confidence",
                            "--encoder", "full").out
    (world / "own.json").write_text(datasets.format_codes(codes[:40]))
    assert "codes for 40 items" in run(capsys, "--codes", "own.json", expect=1).err


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "beuty"], "unknown dataset 'beuty'"),
    (["--dataset", "."], "does not exist or is not a file"),
    (["--k", "40"], "change --k"), (["--loss", "sdpo", "--negatives", "49"], "--negatives"),
    (["--loss", "dpo", "--pool", "1", "--sampler", "none"], "change --k, --negatives"),
    (["--sasrec-dim", "15"], "no multiple of --sasrec-heads"),
    (["--report", "--runs-dir", "no"], "no holds no finished training"),
    (["--codes", "none.json"], "none.json does not exist"),
    (["--precision", "fp16"], "fp16 needs a GPU"),
    (["--item-vectors", "none.npy"], "none.npy"), (["--device", "tpu"], "--device tpu is not auto"),
    (["--device", "cuda:01"], "--device cuda:01 is not auto")])
def test_bad_settings_are_one_sentence(world, capsys, flags, words):
    *warnings, err = run(capsys, *flags, expect=1).err.splitlines()
    assert words in err and err.startswith("error: ")
    assert not warnings


def test_settings_without_effect_are_named(world, capsys):
    said = run(capsys, "--loss", "sft", "--lam", "0.5", "--no-confidence", "--alignment", "1").err
    assert said == "warning: nothing in this run depends on --alignment 1.0 --lam 0.5 --no-confidence\n"
    assert not run(capsys, "--loss", "tb", "--lam", "0.5", "--no-confidence", "--quiet").err
    codes, = (world / "runs" / "toy").glob("codes-*/toy.index.json")
    said = run(capsys, "--loss", "dpo", "--negatives", "5", "--iterations", "9", "--sprec-beta", "0.3").err
    assert said == "warning: nothing in this run depends on --negatives 5 --sprec-beta 0.3 --iterations 9\n"
    said = run(capsys, "--codes", str(codes), "--loss", "sft", "--item-vectors", "none").err
    assert said == "warning: nothing in this run depends on " \
        "--item-vectors none --vector-dim 8 --codebook-size 8 --code-epochs 20\n"


@pytest.mark.parametrize("flags, words", [
    (["--los", "tb"], "unrecognized arguments: --los tb (did you mean --loss?)"),
    (["--k", "many"], "invalid int value"), (["--loss", "tbb"], "invalid choice: 'tbb'"),
    (["--temperature", "0"], "--temperature 0.0 must be at least 0.01"),
    (["--group", "1"], "--group 1 must be at least 2"),
    (["--share", "8"], "--share 8.0 must be at least 0.001 and below 1.001"),
    (["--reward", "aug,xx"], "invalid choice: 'aug,xx'"), (["--show", "-1"], "--show -1 must be at least 0"),
    (["--sft-epochs", "0"], "--sft-epochs 0.0 must be at least 0.001"),
    (["--finetune-epochs", "0"], "--finetune-epochs 0.0 must be at least 0.001"),
    (["--beam", "10"], "--beam 10 must be at least 20"),
    (["--k", "0"], "--k 0 must be at least 1"), (["--lam", "-1"], "--lam -1.0 must be at least 0"),
    (["--lr", "nan"], "--lr nan must be"), (["--dropout", "1"], "--dropout 1.0 must be at least 0")])
def test_wrong_flags_are_one_sentence(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        g.main(flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") == 1


def test_too_little_memory_is_one_sentence_and_a_bug_is_not_hidden(world, capsys):
    sizes = ["--codebook-size", "900000000", "--code-dim", "99999"]
    assert "not enough memory" in run(capsys, *sizes, expect=1).err
    with pytest.raises(RuntimeError, match="a bug"):
        datasets.explain(RuntimeError("a bug"))


def kept_in(runs):
    """What lies in checkpoints, by stage, without the time that it took."""
    found = {path.parent.name: torch.load(path, weights_only=True) for path in runs.glob("*/*/checkpoint.pt")}
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in found.items()}


def noted_in(runs):
    """The lines of all metrics.jsonl, by stage, without the times."""
    return {path.parent.name: [{k: v for k, v in json.loads(line).items() if k != "seconds"}
                               for line in path.open()] for path in runs.glob("*/*/metrics.jsonl")}


def test_the_generator_is_as_the_settings_name_it():
    cfg = g.Config(d_model=24, heads=3, d_kv=5, d_ff=7, layers=4, dropout=0.2, temperature=0.8)
    model, letters = (g.generator(replace(cfg, backbone=name), small_catalogue())
                      for name in ("tiger", "letter"))
    block = model.decoder[0]
    assert (len(model.encoder), len(model.decoder), block.cross.heads, model.dropout.p) == (4, 4, 3, 0.2)
    assert block.attention.o.weight.shape == (24, 15) and block.wo.weight.shape == (24, 7) and model.causal
    assert [model.scale, letters.scale] == pytest.approx([24 ** -0.5, 24 ** -0.5 / 0.8])


def test_letters_codes_depend_on_sasrec_and_its_generator_on_the_temperature():
    tiger, letter = (g.needs(g.Config(backbone=name)) for name in ("tiger", "letter"))
    assert {*letter["codes"]} - {*tiger["codes"]} == {"training", "sasrec", "letter"}
    assert {*letter["sft"]} - {*tiger["sft"]} == {"sasrec", "letter", "temperature"}


def test_codes_are_learnt_from_each_items_own_vector_and_only_twins_get_one_more(monkeypatch):
    sasrec, seen = small_sasrec(), []
    world = types.SimpleNamespace(
        cfg=g.Config(code_dim=4), data=None, device="cpu", publish=lambda codes: None,
        stage=lambda name, build: build(None) if name == "codes" else {"vectors": torch.zeros(30, 2)})
    monkeypatch.setattr(g, "train_codes", lambda run, vectors, collaborative, _:
                        seen.append(collaborative) or torch.arange(30)[:, None])
    catalogue = g.item_codes(world, sasrec)
    torch.testing.assert_close(seen[0], datasets.principal_vectors(sasrec.item.weight[:-1], 4))
    assert catalogue.codes.shape == (30, 1) and catalogue.semantic == 1


def test_a_fine_tuning_begins_where_sft_ended_with_its_own_rate_and_length(world, capsys, monkeypatch):
    tunings, rates, refreshed, pools = [], [], [], []
    init, rate, sasrec_loss = g.FineTuning.__init__, datasets.relative_adamw, g.SASRec.loss
    monkeypatch.setattr(g.FineTuning, "__init__", lambda self, *a: tunings.append(self) or init(self, *a))
    monkeypatch.setattr(g.FineTuning, "refresh", lambda self, *steps: refreshed.append(steps))
    monkeypatch.setattr(datasets, "relative_adamw", lambda *a: rates.append(a[1]) or rate(*a))
    monkeypatch.setattr(g.SASRec, "loss", lambda *a: pools.append(a[-1]) or sasrec_loss(*a))
    run(capsys, "--loss", "dpo", "--finetune-epochs", "2", "--beam", "25", "--sasrec-pool", "40")
    folder, = (world / "runs" / "toy").glob("sft-*")
    begun, data = datasets.read_kept(folder / "checkpoint.pt"), datasets.toy(42)
    assert same(begun["state"], tunings[1].reference.state_dict()) and begun["top"].shape[1] == 25
    batches = math.ceil(int((data.offsets.diff() - 3).sum()) / 64)
    assert rates == [0.02, 0.003] and set(pools) == {40}
    assert refreshed == [(i + 1, n) for n in (batches, round(batches * 2 / 0.8)) for i in range(n)]


def same(one, two):
    """Whether two nests of dicts, tensors and plain values are the same to the last bit."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.mark.parametrize("number, stage, flags", [
    (signal.SIGINT, "codes", ["--backbone", "letter"]), (signal.SIGTERM, "sasrec", []),
    (signal.SIGINT, "sft", []),
    *((signal.SIGTERM, loss, ["--loss", loss, "--group", "4"]) for loss in g.METHODS if loss != "sft")])
def test_a_stopped_training_goes_on_to_the_same_end(world, capsys, monkeypatch, number, stage, flags):
    flags = [*flags, "--finetune-epochs", "8"]
    whole = run(capsys, *flags, "--runs-dir", "whole").out
    done = datasets.Progress.done

    def stopping(progress, step, *rest):
        if progress.title == stage and step == max(2, progress.steps * 2 // 3):
            os.kill(os.getpid(), number)
        done(progress, step, *rest)

    monkeypatch.setattr(datasets.Progress, "done", stopping)
    assert "the same command goes on from here" in run(capsys, *flags, expect=128 + number).err
    folder, = (world / "runs" / "toy").glob(f"{stage}-*")
    assert not (folder / "checkpoint.pt").exists()
    with open(folder / "metrics.jsonl", "a") as notes:                      # as a kill may leave them
        notes.write('{"step": 77, "loss": 1.0}\n{"step": 7')
    monkeypatch.setattr(datasets.Progress, "done", done)
    out = run(capsys, *flags).out
    assert f"{stage}: goes on after step" in out and table(out) == table(whole)
    assert same(kept_in(world / "whole"), kept_in(world / "runs"))
    assert noted_in(world / "whole") == noted_in(world / "runs")            # nothing is noted twice or lost
    assert not list(world.rglob("snapshot.pt"))


def test_a_run_stopped_while_it_is_scored_need_not_train_again(world, capsys, monkeypatch):
    whole, recommended = run(capsys, "--runs-dir", "whole").out, datasets.Run.recommended

    def stopping(run, model, recommend, part, rows=None):
        if part == "test" and "sft" in run.results:
            os.kill(os.getpid(), signal.SIGTERM)
        return recommended(run, model, recommend, part, rows)

    monkeypatch.setattr(datasets.Run, "recommended", stopping)
    run(capsys, expect=143)
    monkeypatch.setattr(datasets.Run, "recommended", recommended)
    out = run(capsys).out
    assert re.search(r"tb: goes on after step (\d+) of \1\n", out) and table(out) == table(whole)
    assert noted_in(world / "whole") == noted_in(world / "runs")


def test_a_signal_that_comes_after_the_last_step_counts():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(datasets.Stopped) as stopped:
        parts = {"model": torch.nn.Linear(1, 1)}
        with datasets.Progress("x", 1, datasets.Journal(), parts, set()) as progress:
            progress.resume()
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.args == (signal.SIGTERM,) and signal.getsignal(signal.SIGTERM) == before


def test_a_signal_counts_while_something_is_being_printed(monkeypatch):
    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    progress = datasets.Progress("x", 1, datasets.Journal(), {}, set())
    monkeypatch.setattr(sys, "stderr", Busy())
    progress.note(signal.SIGTERM, None)
    assert progress.signals == [signal.SIGTERM]


@pytest.mark.parametrize("first", [0, 31])
def test_the_time_left_counts_validations_and_the_next_training(monkeypatch, capsys, tmp_path, first):
    clock, parts = [0.0], {"model": torch.nn.Linear(1, 1), "scaler": torch.amp.GradScaler(enabled=False)}
    monkeypatch.setattr(datasets.time, "perf_counter", lambda: clock[0])
    with datasets.Journal(tmp_path, every=1e9, afterwards=3.0) as journal, \
            datasets.Progress("sft", 80, journal, parts, {20, 40, 60, 80}) as progress:
        progress.resume()
        progress.first = first                                      # as if it went on from there
        for step in range(first + 1, 41):                           # steps of 2 s, validations of 30 s
            checked = step % 20 == 0
            clock[0] += 2 + 30 * checked
            progress.done(step, torch.tensor(1.0), {"N@10": 0.1} if checked else {}, ({}, 0.1))
    # this one: 40 steps and 2 validations more; the next: 240 steps, 4 validations
    assert "step 40 of 80" in (out := capsys.readouterr().out) and "about 12:20 left" in out, out


def test_notes_begin_anew_where_nothing_tells_how_far_they_hold(tmp_path):
    notes = tmp_path / "metrics.jsonl"
    notes.write_text('{"step": 50}\n' * 40)
    with datasets.Journal(tmp_path) as journal:             # killed before its first snapshot
        journal.save({"step": 20})
        for step in range(21, 90):
            journal.log({"step": step})
    with datasets.Journal(tmp_path) as journal:
        journal.log({"step": 50})
    assert [entry["step"] for entry in datasets.noted(tmp_path)] == [50]
    notes.unlink()
    with datasets.Journal(tmp_path) as journal:
        journal.log({"step": 60})
        journal.save({"step": 70})
    notes.write_text("")
    with datasets.Journal(tmp_path) as journal:
        journal.log({"step": 80})
    assert [entry["step"] for entry in datasets.noted(tmp_path)] == [80]
    notes.write_text("{")
    with pytest.raises(DataError, match="metrics.jsonl is damaged"):
        datasets.noted(tmp_path)


def test_a_file_that_is_replaced_is_whole_at_every_moment(tmp_path):
    path, torn = tmp_path / "file", []
    datasets.write_atomically(path, b"a" * 1_000_000)

    def look():
        while not torn or torn[-1] != "end":
            content = path.read_bytes()
            if len(content) != 1_000_000 or content.count(content[0]) != len(content):
                torn.append(len(content))

    reader = threading.Thread(target=look)
    reader.start()
    for i in range(150):
        datasets.write_atomically(path, b"ab"[i % 2:i % 2 + 1] * 1_000_000)
    found = list(torn)
    torn.append("end")
    reader.join()
    assert found == [] and os.listdir(tmp_path) == ["file"]


def test_dropout_draws_the_same_however_long_its_strip_grew():
    short, grown, x = g.Dropout(0.3), g.Dropout(0.3), torch.ones(50)
    grown(torch.ones(1 << 23))
    torch.manual_seed(3)
    first = short(x)
    torch.manual_seed(3)
    assert torch.equal(grown(x), first)


def wait_for(condition, process, seconds=120):
    """Until it holds, or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def started(folder, *flags, **environment):
    """The command as a user gives it, left to run."""
    return subprocess.Popen([sys.executable, str(HERE / "gflowgr.py"), *QUICK, *flags], cwd=folder, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def killed(folder, flags, stages, moment):
    """Start the command again and again and kill it: in each of the stages, `moment()` seconds after its
    first snapshot; then let it end, and return what it printed."""
    for stage in stages:
        process = started(folder, *flags)
        wait_for(lambda: list(folder.glob(f"runs/*/{stage}-*/snapshot.pt")), process)
        time.sleep(moment())
        process.kill()
        process.communicate()
    process = started(folder, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


SMALL = ["--dataset", "Small", "--device", "cpu", "--sft-epochs", "20", "--finetune-epochs", "20"]


def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path):
    write_world(tmp_path / "Small", small_world())
    whole = command(tmp_path, *SMALL, "--runs-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    out = killed(tmp_path, [*SMALL, "--save-every", "0"], ["sasrec", "sft", "tb"], lambda: 0.05)
    assert table(out) == table(whole.stdout)
    assert same(kept_in(tmp_path / "whole"), kept_in(tmp_path / "runs"))
    assert noted_in(tmp_path / "whole") == noted_in(tmp_path / "runs")
    assert len(kept_in(tmp_path / "runs")) == 5
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", out)                    # piped: no control characters


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_been(tmp_path):
    write_world(tmp_path / "Small", small_world())
    chance, kills = random.Random(0), 0
    for loss, backbone in (("tb", "letter"), ("sprec", "tiger"), ("grpo", "tiger"), ("db", "letter")):
        flags = [*SMALL, "--loss", loss, "--backbone", backbone, "--group", "4", "--code-epochs", "300",
                 "--runs-dir"]
        whole = command(tmp_path, *flags, f"whole-{loss}")
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        stages = ["sasrec", "codes", "sft", loss] * 2
        out = killed(tmp_path, [*flags, "runs", "--save-every", "0.05"], stages,
                     lambda: chance.choice([0.0, 0.1, 0.4, 0.8]) * chance.random())
        kills += len(stages)
        assert table(out) == table(whole.stdout)
        assert same(kept_in(tmp_path / f"whole-{loss}"), kept_in(tmp_path / "runs"))
        assert noted_in(tmp_path / f"whole-{loss}") == noted_in(tmp_path / "runs")
    assert kills == 32


def test_two_runs_at_once_share_the_work_and_outlive_each_other(tmp_path):
    write_world(tmp_path / "Small", small_world())
    first, second = (started(tmp_path, *SMALL) for _ in range(2))
    (one, err), (two, _) = (process.communicate(timeout=300) for process in (first, second))
    assert first.returncode == second.returncode == 0, err
    numbers = [[row[:-1] for row in table(text)] for text in (one, two)]
    assert numbers[0] == numbers[1] and not list(tmp_path.rglob("*.part"))
    assert (one + two).count("now kept") == 5               # each stage once
    third = started(tmp_path, *SMALL, "--k", "3", "--save-every", "0")
    wait_for(lambda: list(tmp_path.glob("runs/*/tb-*/snapshot.pt")), third)
    fourth = started(tmp_path, *SMALL, "--k", "3")
    seen = ""
    while "waiting for its result" not in seen and "goes on after" not in seen:
        assert (line := fourth.stdout.readline()) != ""
        seen += line
    third.kill()
    third.communicate()
    out, err = fourth.communicate(timeout=300)
    assert fourth.returncode == 0 and "then tb" in out, err


def test_fresh_starts_over_and_a_damaged_snapshot_is_set_aside(world, capsys, monkeypatch):
    first = run(capsys).out
    assert run(capsys, "--fresh").out.count("now kept") == 5
    done = datasets.Progress.done

    def stopping(progress, step, *rest):
        if progress.title == "tb" and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        done(progress, step, *rest)

    monkeypatch.setattr(datasets.Progress, "done", stopping)
    run(capsys, "--k", "3", expect=143)
    monkeypatch.setattr(datasets.Progress, "done", done)
    snapshot, = world.rglob("snapshot.pt")
    snapshot.write_bytes(snapshot.read_bytes()[:-100])
    found = run(capsys, "--k", "3")
    assert "snapshot.pt is damaged" in found.err and "goes on" not in found.out
    assert table(found.out)[:-1] == table(first)[:-1]
    monkeypatch.setattr(datasets.Progress, "done", stopping)
    run(capsys, "--fresh", expect=143)
    assert "goes on" not in run(capsys, "--fresh", expect=143).out
    monkeypatch.setattr(datasets.Progress, "done", done)
    out = run(capsys).out                                   # nothing of before --fresh is mixed into it
    assert "tb: goes on after step 3" in out and table(out) == table(first)
    checkpoints = sorted(world.rglob("checkpoint.pt"))
    assert "--k" in run(capsys, "--fresh", "--k", "40", expect=1).err       # refused, it removes nothing
    assert sorted(world.rglob("checkpoint.pt")) == checkpoints
    assert "would do the shared SFT again" in run(capsys, "--fresh", "--finetune-seeds", "1,2", expect=1).err


def test_quiet_prints_the_table_alone(world, capsys):
    loud, quiet = run(capsys), run(capsys, "--quiet", "--runs-dir", "again")
    assert quiet.err == "" and quiet.out.splitlines()[0].startswith("test ")
    assert table(quiet.out) == table(loud.out) and len(quiet.out.splitlines()) == 6


def test_plot_is_drawn_or_says_what_is_missing(world, capsys, monkeypatch):
    if importlib.util.find_spec("matplotlib"):
        path = run(capsys, "--plot").out.splitlines()[-1].removeprefix("drawn: ")
        assert (world / path).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    err = run(capsys, "--plot", expect=1).err
    assert err == "error: --plot needs matplotlib, which is not installed: pip install matplotlib\n"


def test_softmax_all_reaches_the_training(world, capsys):
    first = []
    for softmax in ("trie", "all"):
        run(capsys, "--softmax", softmax, "--runs-dir", softmax)
        first.append([datasets.noted(next((world / softmax / "toy").glob(f"{stage}-*")))[0]["loss"]
                      for stage in ("sft", "tb")])
    assert all(more > less + 0.1 for less, more in zip(*first))     # what leads nowhere has its share, too


@pytest.mark.parametrize("softmax", ["trie", "all"])
def test_recommend_gives_what_the_run_gave(world, capsys, monkeypatch, softmax):
    run(capsys, "--precision", "fp32", "--max-history", "4", "--softmax", softmax)
    data = datasets.toy(42)
    for stage in ("sft", "tb"):
        folder, = (world / "runs" / "toy").glob(f"{stage}-*")
        top = torch.load(folder / "checkpoint.pt", weights_only=True)["top"]
        assert g.recommend(folder, np.array([17, 4])) == g.recommend(folder, torch.tensor([17, 4])) \
            == g.recommend(folder, [17, 4])
        for user in (0, 7, 31):
            history = data.items[data.offsets[user]:data.offsets[user + 1] - 1].tolist()
            assert g.recommend(folder, history) == top[user, :10].tolist()
            assert g.recommend(str(folder), history, 20) == top[user].tolist()
    assert sorted(g.recommend(folder, [3], 50)) == list(range(50))
    (world / "link").symlink_to(folder)
    shutil.copytree(folder, world / "copy")
    monkeypatch.chdir(folder)
    for same_folder in (world / "link", world / "copy", "."):
        assert g.recommend(same_folder, history, 20) == top[user].tolist()
    content = (world / "copy" / "checkpoint.pt").read_bytes()[:-50]
    (world / "copy" / "checkpoint.pt").write_bytes(content)
    with pytest.raises(DataError, match="or a damaged one"):
        g.recommend(world / "copy", history)
    assert (world / "copy" / "checkpoint.pt").read_bytes() == content       # whoever only reads moves nothing
    for history, k in (([], 10), ([50], 10), ([-1], 10), (["a"], 10), ([1], 0), ([1], 51), ([1.0], 10),
                       ([[1]], 10), (5, 10), ([1], 2.5)):
        with pytest.raises(DataError, match="needs item ids of 0 to 49, and k must be 1 to 50"):
            g.recommend(folder, history, k)
    sasrec, = (world / "runs" / "toy").glob("sasrec-*")
    codes, = (world / "runs" / "toy").glob("codes-*")
    for wrong in (sasrec, codes, world / "nowhere", world):
        with pytest.raises(DataError, match="holds no finished generator"):
            g.recommend(wrong, [1])


def test_a_generator_from_before_the_causal_encoder_reads_as_it_was_trained(world, capsys):
    run(capsys, "--encoder", "full", "--loss", "sft")
    config = next((world / "runs" / "toy").glob("sft-*")) / "config.json"
    settings, lists = json.loads(config.read_text()), []
    for encoder in ("full", "causal", None):
        config.write_text(json.dumps({**settings, "encoder": encoder} if encoder else
                                     {name: value for name, value in settings.items() if name != "encoder"}))
        lists.append(g.recommend(config.parent, [17, 4, 30, 2], 20))
    assert lists[0] == lists[2] != lists[1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has it")
def test_output_that_nobody_can_take_is_one_sentence(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, HERE / "data.py", "toy"], stdout=full, stderr=subprocess.PIPE,
                              env=environment, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device; finished stages are kept, half-written ones not\n"
    datasets.drop_unwritten(None)                               # no stream at all


def test_files_that_change_during_a_run_are_read_once(world, capsys, monkeypatch):
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    (world / "own.json").write_text(datasets.format_codes(every[:50]))
    train = g.train_sasrec

    def meanwhile(run):
        (world / "own.json").write_text(datasets.format_codes(every[-50:]))
        return train(run)

    monkeypatch.setattr(g, "train_sasrec", meanwhile)
    run(capsys, "--codes", "own.json", "--loss", "sft")
    kept, = (world / "runs" / "toy").glob("codes-*/checkpoint.pt")
    assert torch.equal(datasets.read_kept(kept)["codes"], every[:50])
    monkeypatch.setattr(g, "train_sasrec", train)
    assert "now kept" in run(capsys, "--codes", "own.json", "--loss", "sft").out      # by others: another key


def test_a_locked_folder_is_waited_for_and_a_read_only_one_is_not(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock").chmod(0o444)                           # another user's: locked all the same
    waits = []
    with datasets.alone(tmp_path), monkeypatch.context() as patched:
        patched.setattr(datasets.time, "sleep", waits.append)
        patched.setattr(datasets, "print", lambda *text, **_: waits.append(text), raising=False)
        patched.setattr(datasets.fcntl, "flock", functools.partial(gives_way, waits, datasets.fcntl.flock))
        with datasets.alone(tmp_path):
            pass
    assert len(waits) == 10 and "waiting for its result" in waits[2][0]

    def refuse(reason, *_):
        raise OSError(reason, "no")

    really, asked = os.open, []
    with monkeypatch.context() as patched:                      # NFS locks only what may be written
        patched.setattr(datasets.os, "open", lambda path, access, mode: asked.append(access) or (
            refuse(errno.EACCES) if access & os.O_RDWR else really(path, access, mode)))
        with datasets.alone(tmp_path), open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):
            datasets.fcntl.flock(other, datasets.fcntl.LOCK_EX | datasets.fcntl.LOCK_NB)
    assert asked == [os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_CREAT]
    for reason in (errno.EACCES, errno.EROFS):
        monkeypatch.setattr(datasets.os, "open", functools.partial(refuse, reason))
        with datasets.alone(tmp_path):
            pass
    monkeypatch.setattr(datasets.os, "open", functools.partial(refuse, errno.ENOSPC))
    with pytest.raises(OSError), datasets.alone(tmp_path):      # there the stage could not be kept, either
        pass


def test_what_a_killed_run_had_half_written_goes_with_the_lock_alone(tmp_path, monkeypatch):
    part = tmp_path / "snapshot.pt.123.part"
    part.touch()
    with monkeypatch.context() as patched:
        patched.setattr(datasets.fcntl, "flock", lambda *_: open(tmp_path / "no locks here"))
        with datasets.alone(tmp_path), datasets.Journal(tmp_path):      # it may be another's, at work now
            assert part.exists()
    with datasets.alone(tmp_path):
        assert not part.exists()


def gives_way(waits, flock, lock, how):
    """flock, by a kernel that gives the lock after 9 attempts whoever has it."""
    if len(waits) < 10:
        flock(lock, how)


def test_what_is_kept_is_looked_at_under_the_lock(world, capsys, monkeypatch):
    run(capsys)
    inside, read, alone = [], datasets.read_kept, datasets.alone

    @contextlib.contextmanager
    def watched(folder):
        with alone(folder):
            inside.append(folder)
            yield
            inside.pop()

    def reading(path, *rest):
        assert inside == [path.parent] or rest[-1:] == (False,)     # that one moves nothing
        return read(path, *rest)

    monkeypatch.setattr(datasets, "alone", watched)
    monkeypatch.setattr(datasets, "read_kept", reading)
    assert run(capsys).out.count("kept from before") == 4       # without the vectors, which nobody asks for


def test_a_full_disk_is_said_and_leaves_nothing_half_written(world, capsys, monkeypatch):
    write = datasets.write_atomically

    def full(path, content):
        if path.name == "checkpoint.pt" and "sasrec" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(datasets, "write_atomically", full)
    err = run(capsys, expect=1).err
    assert err.startswith("error: No space left on device: runs/toy/sasrec") and err.count("\n") == 1
    assert not list(world.rglob("*.part"))


def test_what_was_made_from_codes_that_are_lost_is_done_again(world, capsys):
    def kept():
        out = run(capsys).out
        return [line.split()[0] for line in out.splitlines() if "kept from before" in line], out

    first, (folder,) = run(capsys).out, (world / "runs" / "toy").glob("codes-*")
    (folder / "checkpoint.pt").unlink()
    again, out = kept()
    assert again == ["sasrec", "vectors", "sft", "finetune"] and table(out) == table(first)   # the same codes
    codes = datasets.read_kept(folder / "checkpoint.pt")
    datasets.write_checkpoint(folder / "checkpoint.pt", {**codes, "codes": codes["codes"].flip(0)})
    again, out = kept()
    assert again == ["sasrec", "codes"] and table(out) != table(first)
    index = datasets.read_codes(folder / "toy.index.json", len(codes["codes"]))
    assert torch.equal(index, codes["codes"].flip(0))
    assert len(list((world / "runs" / "toy").glob("*/checkpoint.pt.outdated"))) == 2
    assert kept()[0] == ["sasrec", "codes", "sft", "finetune"]


def test_foreign_and_damaged_checkpoints_are_done_again(world, capsys):
    first = run(capsys).out
    path, = (world / "runs" / "toy").glob("sft-*/checkpoint.pt")
    result = datasets.read_kept(path)
    torch.save({**result, "of": "sft-another"}, path)
    found = run(capsys)
    assert "is damaged or not of this program" in found.err and table(found.out) == table(first)
    torch.save({**result, "state": {"embedding.weight": torch.zeros(2, 2)}}, path)
    assert "holds a model of another size" in run(capsys, expect=1).err


def test_diversity_and_case_studies_are_printed(world, capsys):
    out = run(capsys, "--diversity", "--show", "2").out
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("top 10"))
    assert lines[at].split()[2:5] == ["coverage", "KL", "std"]
    assert [line.split()[0] for line in lines[at + 1:at + 5]] == ["popularity", "SASRec", "SFT", "then"]
    path, = (world / "runs" / "toy").glob("tb-*/checkpoint.pt")
    kept, data = datasets.read_kept(path), datasets.toy(42)
    users = [i for i, line in enumerate(lines) if line.startswith("user ")]
    assert len(users) == 2
    for i in users:
        user = int(lines[i].split()[1])
        sequence = data.items[data.offsets[user]:data.offsets[user + 1]].tolist()
        history = [line.strip() for line in lines[i + 1:i + len(sequence)]]
        assert history == [data.titles[item] for item in sequence[:-1]]
        assert lines[i + len(sequence)] == "=> " + data.titles[sequence[-1]]
        pairs = lines[i + len(sequence) + 2:i + len(sequence) + 12]
        assert [line[50:] for line in pairs] == [data.titles[item][:44] for item in kept["top"][user, :10]]
        found = {line[3:47].strip() for line in pairs}
        assert all(("*" in line[47:50]) == (line[50:] not in found) or "=>" in line[47:50] for line in pairs)


def test_diversity_of_lists_longer_than_the_catalogue():
    data = datasets.Data("x", ["a"] * 4, ["a"] * 4, torch.tensor([0, 1, 2, 3] * 2), torch.tensor([0, 4, 8]),
                         None, "")
    top = F.pad(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), (0, 16), value=4)
    run = types.SimpleNamespace(data=data, device="cpu", parts=datasets.split(data))
    out = datasets.diversity_table(run, {"SFT": {"top": top}}, lambda history: torch.tensor(
        [[0.0, 0.2, 0.6, 1.0]]).expand(len(history), -1), lambda scores: scores)
    coverage, kl, _, mean, spread, _, rank = map(float, out.splitlines()[1].split()[1:])
    assert (coverage, kl, mean, spread, rank) == (1, 0, 0.45, 1, 2.5)       # of 4 items; the padding is none


def test_the_change_from_sft_has_the_standard_error_of_the_users_differences(world, capsys):
    out = run(capsys).out
    folders = [next((world / "runs" / "toy").glob(f"{stage}-*")) for stage in ("sft", "tb")]
    before, after = (datasets.read_kept(folder / "checkpoint.pt")["top"] for folder in folders)
    data, change = datasets.toy(42), {"R@10": [], "N@10": []}
    for user in range(data.n_users):
        taken = data.items[data.offsets[user + 1] - 1].item()
        lists = after[user, :10].tolist(), before[user, :10].tolist()
        ranks = [items.index(taken) if taken in items else math.inf for items in lists]
        change["R@10"].append((ranks[0] < 10) - (ranks[1] < 10))
        change["N@10"].append(np.subtract(*(1 / math.log2(rank + 2) for rank in ranks)))
    for name, values in change.items():
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert error > 0 and f"{name} {np.mean(values):+.4f} ± {error:.4f}" in out.splitlines()[-1], out


def test_report_has_mean_spread_and_the_papers_figures(tmp_path):
    def keep(name, test, **config):
        folder = tmp_path / "Beauty" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"dataset": "beauty", "seed": 1, **config}))
        metrics = dict.fromkeys(("R@5", "R@10", "N@5", "N@10"), test)
        (folder / "metrics.jsonl").write_text(json.dumps({"test": metrics}))
        (folder / "checkpoint.pt").touch()

    both = dict(backbone="tiger", sft_epochs=g.Config().sft_epochs)
    tuned = dict(both, lam=g.Config().lam)
    keep("sasrec-1", 0.07, sasrec_dim=128)
    keep("sft-1", 0.05, **both)
    for i, test in enumerate((0.04, 0.06)):
        keep(f"tb-{i}", test, **tuned, loss="tb", k=4, confidence=True, seed=1 + i)
    keep("tb-again", 0.08, **tuned, loss="tb", k=4, confidence=True, seed=2, precision="fp32")
    keep("tb-8", 0.03, **tuned, loss="tb", k=8, confidence=True)
    keep("tb-9", 0.02, **tuned, loss="tb", k=4, confidence=False)
    keep("db-1", 0.01, **{**tuned, "sft_epochs": 3.0}, loss="db", k=4, confidence=True)
    (tmp_path / "Beauty" / "tb-0" / "checkpoint.pt").with_name("other.txt").touch()
    keep("tb-cut-off", 0.9, **tuned, loss="tb")
    (tmp_path / "Beauty" / "tb-cut-off" / "metrics.jsonl").write_text('{"step": 1}')
    keep("ipa-1", 0.08, **{**tuned, "lam": 0.1}, loss="ipa")
    parts = {re.search("--dataset beauty ?(.*) ..`", part)[1]: part
             for part in datasets.report(tmp_path, g.Config).split("## Beauty")[1:]}
    first, second, third = (parts.pop(flags) for flags in ("", "--sft-epochs 3.0", "--lam 0.1"))
    assert not parts and "| tiger | ipa | 0.0800 |" in third        # what Table 2 has no row for
    assert "|  | SASRec | 0.0700 | 0.0700 | 0.0700 | 0.0700 | 1 |" in first
    assert "| tiger | SFT | 0.0500 | 0.0500 [0.0558] | 0.0500 | 0.0500 | 1 |" in first
    assert "| tiger | tb | 0.0550 ± 0.0212 | 0.0550 ± 0.0212 [0.0651] |" in first and "0.9" not in first
    assert "| tiger | db |  |  |  |  |  |" in first and "| letter | tb |  |  |  |  |  |" in first
    rows = [line.split(" | ") for line in first.splitlines() if line.startswith("| `--")]
    rows = {row[0][2:]: row[1:] for row in rows}
    assert rows["`--k 8`"][3:6] == ["0.0300", "0.0300", "1"] and rows["`--no-confidence`"][3] == "0.0200"
    assert len(rows) == 10 and rows["`--reward aug`"][3] == ""
    assert "`python gflowgr.py --dataset beauty --sft-epochs 3.0 ..`" in second
    assert "| tiger | db | 0.0100 |" in second


def test_report_shows_a_sasrec_that_stands_alone(world, capsys, monkeypatch):
    def stop(*_):
        raise datasets.Stopped(15)

    monkeypatch.setattr(g, "item_codes", stop)
    run(capsys, expect=143)
    out = run(capsys, "--report").out
    assert out.count("## toy") == 1 and re.search("[|] SASRec [|] 0[.][0-9]{4} ", out)


def test_report_keeps_other_data_and_other_codes_apart(world, capsys):
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    for name, codes in (("a", every[:50]), ("b", every[-50:])):
        (world / name).mkdir()
        write_world(world / name / "Beauty", datasets.toy(ord(name)))
        assert "0.0558" in run(capsys, "--dataset", f"{name}/Beauty", "--loss", "sft").out
        (world / "own.json").write_text(datasets.format_codes(codes))
        out = run(capsys, "--dataset", "a/Beauty", "--loss", "sft", "--codes", "own.json").out
        assert "0.0558" not in out
    shutil.copy("own.json", "same.json")
    run(capsys, "--dataset", "a/Beauty", "--loss", "tb", "--codes", "same.json")
    sections = run(capsys, "--report").out.split("## Beauty")[1:]
    assert sorted("[0.0558]" in part for part in sections) == [False, False, True, True]    # by its own codes
    assert all(line.endswith("| 1 |") for part in sections for line in part.splitlines()
               if re.match("[|] (tiger [|] (SFT|sft)| [|] SASRec)", line) and "0." in line)


def test_report_reads_what_runs_have_kept(world, capsys):
    run(capsys, "--loss", "grpo", "--group", "2")
    run(capsys, "--sampler", "none")
    out = run(capsys, "--report").out
    assert out.count("## toy") == 1 and "--group 2 ..`" in out    # tb does not depend on that
    assert sum(line.count(" 1 |") for line in out.splitlines()) == 4    # SASRec, SFT, grpo; tb's ablation
    sft, = (world / "runs" / "toy").glob("sft-*")
    notes = sft / "metrics.jsonl"
    for spoiled in ('{"test": {"R@10": 0.1}}', '{"test": {"R@5": 1, "R@10": "x", "N@5": 1, "N@10": 1}}'):
        whole = notes.read_bytes()
        notes.write_text(spoiled)
        assert run(capsys, "--report").err.count("is left out: its notes are damaged") == 1
        notes.write_bytes(whole)
    shutil.copytree(sft, sft.with_name("old-sft"))
    for content in ("{}", "[]", '{"dataset": []}', "{", '{"dataset": "toy"}',
                    '{"dataset": "toy", "seed": [1]}', '{"dataset": "toy", "seed": 1, "made_from": null}'):
        (sft / "config.json").write_text(content)
        found = run(capsys, "--report")
        assert found.err.count("is left out: its notes are damaged") == found.err.count("\n") == 2
        assert "Table 1" in found.out


def test_choices_are_the_methods():
    field, = (f for f in g.dataclasses.fields(g.Config) if f.name == "loss")
    assert field.metadata["choices"] == tuple(g.METHODS)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        g.main(["--help"])
    out = capsys.readouterr().out
    assert all("--" + f.name.replace("_", "-") in out for f in g.dataclasses.fields(g.Config))

# ------------------------------------------------------------------------------------------ 12. rough worlds

WORDS = ["", " ", "red", "red", "blue shoe", "naïve café", "日本語の商品", "🎸🎸", "\u202eevil",
         "a\u0000b", "\ud800", "x" * 3000, "<a_1>", "{\"0\": 1}", "%s %d", "\n\r\t", "ﬁ", "e\u0301",
         "-1e309", "--loss"]
VALUES = [None, True, -1, 0, 3, 10 ** 30, 1.5, 1e308, math.nan, math.inf, "", "2", "\n", [], [[]], {},
          [0, 1, 2], {"title": 1}, {"title": None}, ["<a_1>"], "<a_999999999>", [0] * 5]


def rough_world(folder, chance):
    """A small dataset that nobody would publish: few items, loyal users, texts of every kind."""
    n_items = chance.choice([2, 3, 5, 12, 40])
    few = chance.sample(range(n_items), min(n_items, chance.choice([1, 2, 40])))
    users = {chance.choice(WORDS)[:9] + str(u): chance.choices(few, k=chance.choice([3, 3, 4, 9, 30]))
             for u in range(chance.choice([1, 2, 7, 30]))}
    users["twin"] = list(next(iter(users.values())))
    folder.mkdir()
    texts = {str(i): {"title": chance.choice(WORDS), "description": chance.choice(WORDS)}
             for i in range(n_items)}
    (folder / f"{folder.name}.inter.json").write_text(json.dumps(users))
    (folder / f"{folder.name}.item.json").write_text(json.dumps(texts))


def rough_settings(chance):
    """Settings that each are allowed; whether they go together is for the program to say."""
    options = {"loss": list(g.METHODS), "backbone": ["tiger", "letter"], "levels": [1, 2, 4], "k": [1, 2, 9],
               "codebook-size": [1, 2, 16], "code-epochs": [1, 5], "beam": [20, 60], "batch": [1, 7, 1000],
               "reward": ["aug,cf,sim", "aug", "sim"], "sampler": ["curriculum", "random", "none"],
               "z": ["user", "scalar"], "max-history": [1, 2, 20], "sasrec-length": [1, 50], "group": [2, 5],
               "sasrec-pool": [1, 10, 50000], "pool": [1, 10, 512], "negatives": [1, 3],
               "evaluations": [1, 9], "valid-users": [1, 4000], "dropout": [0, 0.5], "lam": [0, 1],
               "vector-dim": [1, 64],
               "finetune-epochs": [0.001, 1, 3], "iterations": [1, 5], "hardest": [0, 3], "show": [0, 2],
               "scale": ["minmax", "softmax"]}
    flags = [f"--{name}={chance.choice(values)}" for name, values in options.items()]
    return [*flags, *chance.choice([[], ["--no-confidence"], ["--from-scratch"], ["--diversity"]])]


def survive(folder, capsys, seed):
    """One rough world, all stages: it trains, or is refused by one sentence. Returns whether it trained."""
    chance = random.Random(seed)
    rough_world(folder / f"World{seed}", chance)
    code = g.main([*QUICK, f"--dataset={folder / f'World{seed}'}", f"--runs-dir={folder / 'runs'}",
                   *rough_settings(chance)])
    out, err = capsys.readouterr()
    if code:
        assert code == 1 and err.splitlines()[-1].startswith("error: ") and "Traceback" not in err, err
        return False
    for path in (folder / "runs" / f"World{seed}").glob("*/checkpoint.pt"):
        kept = torch.load(path, weights_only=True)
        if "top" not in kept:
            continue
        n_items = len(datasets.read_folder(folder / f"World{seed}").titles)
        for row in kept["top"].tolist():
            real = [item for item in row if item < n_items]
            assert len(set(real)) == len(real) and min(row) >= 0 and max(row) <= n_items
        if "codes" in kept:
            cfg, kept, _ = datasets.read_generator(path.parent, g.Config, [0], 1)
            catalogue = g.Catalogue.of(kept["codes"], kept["semantic"])
            model = datasets.load_state(g.generator(cfg, catalogue), kept["state"], path.parent)
            every = torch.arange(n_items)[None]
            log_p = log_probs(model, catalogue, torch.tensor([[0, 1, 0]]), every)[0].sum(-1)
            assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
            assert all(0 <= value <= 1 for part in ("valid", "test") for value in kept[part].values())
    return True


def test_rough_worlds_train_or_are_refused_by_name(tmp_path, capsys):
    assert sum(survive(tmp_path, capsys, seed) for seed in range(25)) > 10


@pytest.mark.slow
def test_hundreds_of_rough_worlds(tmp_path, capsys):
    assert sum(survive(tmp_path, capsys, seed) for seed in range(100, 350)) > 100


def spoiled(content, chance):
    """A file that something went wrong with."""
    kind = chance.randrange(6)
    if kind == 0:                                                           # bytes flipped
        content = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        return bytes(content)
    if kind == 1:                                                           # cut, or cut out
        a, b = sorted(chance.randrange(len(content) + 1) for _ in range(2))
        return content[:a] + content[b:] if chance.random() < 0.5 else content[:a]
    if kind == 2:                                                           # nested without end, huge numbers
        return chance.choice([b"[" * 100_000, b'{"0":' * 100_000, b"1" * 100_000,
                              b'{"0": ' + b"9" * 5000 + b"}"])
    if kind == 3:                                                           # another file altogether
        return chance.choice([b"", b"\0" * 500, b"null", b"\xef\xbb\xbf{}", b"PK\3\4", b"<html>",
                              content * 2])
    tree = json.loads(content)                                              # a wrong value or key somewhere
    for _ in range(chance.choice([1, 1, 4])):
        key, value = chance.choice(list(tree)), chance.choice(VALUES)
        if kind == 4 and isinstance(tree[key], list) and tree[key]:
            tree[key][chance.randrange(len(tree[key]))] = value
        elif kind == 4 and isinstance(tree[key], dict):
            tree[key][chance.choice(["title", "description", "price"])] = value
        else:
            tree[chance.choice([key, "a\nb", "", "00", str(len(tree))])] = value
    return json.dumps(tree).encode()


def bear(folder, capsys, seeds):
    """Read spoiled files of all kinds: each is read, or refused by one sentence -> how many are read."""
    data, read = small_world(8, 6), 0
    write_world(folder / "Good", data)
    (folder / "Bad").mkdir()
    codes, vectors = folder / "codes.json", folder / "own.npy"
    codes.write_text(datasets.format_codes(torch.arange(18).view(6, 3)))
    np.save(vectors, np.arange(12.0).reshape(6, 2))
    good = {"inter": (folder / "Good" / "Good.inter.json").read_bytes(), "codes": codes.read_bytes(),
            "item": (folder / "Good" / "Good.item.json").read_bytes(), "vectors": vectors.read_bytes()}
    readers = {"inter": lambda: datasets.load(str(folder / "Bad")),
               "codes": lambda: datasets.read_codes(codes, 6),
               "item": lambda: datasets.load(str(folder / "Bad")),
               "vectors": lambda: datasets.read_vectors(vectors, 6)}
    places = {"inter": folder / "Bad" / "Bad.inter.json", "item": folder / "Bad" / "Bad.item.json",
              "codes": codes, "vectors": vectors}
    for seed in seeds:
        chance = random.Random(seed)
        kind = chance.choice(list(good))
        for name, path in places.items():
            path.write_bytes(good[name])
        places[kind].write_bytes((flipped if kind == "vectors" else spoiled)(good[kind], chance))
        try:
            readers[kind]()
            read += 1
        except DataError as error:
            names = ["Bad.inter.json", "Bad.item.json"] if kind == "item" else [places[kind].name]
            assert "\n" not in str(error) and len(str(error)) < 1000
            assert any(name in str(error) for name in names)
        capsys.readouterr()
    return read


def flipped(content, chance):
    """Bytes of a file that is not JSON, flipped, cut, or with another head."""
    if chance.random() < 0.5:
        content = bytearray(content)
        for _ in range(chance.choice([1, 3, 20])):
            content[chance.randrange(len(content))] = chance.randrange(256)
        return bytes(content)
    cut = content[:chance.randrange(len(content))]
    return chance.choice([cut, content.replace(b"<f8", b"|O8"), content.replace(b"(6, 2)", b"(6, 9)"),
                          b"\x93NUMPY"])


def test_spoiled_files_are_read_or_refused_in_one_sentence(tmp_path, capsys):
    assert 0 < bear(tmp_path, capsys, range(300)) < 150


def check_spoiled_checkpoints(folder, capsys, seeds):
    """A checkpoint in which something was changed is what it was, or is set aside: never read wrongly."""
    path = folder / "checkpoint.pt"
    content = {"x": torch.arange(50), "y": {"R@10": 0.5}, "of": f"{folder.name}/checkpoint.pt"}
    datasets.write_checkpoint(path, content)
    whole = path.read_bytes()
    for seed in seeds:
        path.write_bytes(flipped(whole, random.Random(seed)))
        result = datasets.read_kept(path)
        assert result is None or same(result, content)
        assert (result is None) == (not path.exists()) == ("is damaged" in capsys.readouterr().err)


def test_spoiled_checkpoints_are_never_read_wrongly(tmp_path, capsys):
    check_spoiled_checkpoints(tmp_path, capsys, range(100))
    os.mkfifo(tmp_path / "pipe.pt")                                     # and no waiting for what never comes
    assert datasets.read_kept(tmp_path / "pipe.pt") is None


@pytest.mark.slow
def test_thousands_of_spoiled_files(tmp_path, capsys):
    bear(tmp_path, capsys, range(1000, 5000))
    (tmp_path / "kept").mkdir()
    check_spoiled_checkpoints(tmp_path / "kept", capsys, range(1000, 3000))


# ----------------------------------------------------------------------------------------------- benchmark

# Histories of 1, 2, .. 20 items among Beauty's 131,413 training pairs (data.py, max_history 20), and the same
# pairs as rows of that many items, each with the next one for a target.
BEAUTY_ROWS = [87, 7256, 4293, 2750, 1867, 1420, 931, 737, 607, 474,
               391, 296, 231, 249, 171, 153, 135, 136, 94, 1329]
BEAUTY_LENGTHS = [22363, 22363, 15201, 10980, 8300, 6489, 5123, 4242, 3547, 2989,
                  2550, 2189, 1927, 1720, 1507, 1366, 1248, 1136, 1019, 15154]
TIGER = dict(heads=6, d_kv=64, d_ff=1024, layers=4)
SIZES = {"TIGER's size": TIGER, "TIGER's size, full encoder": {**TIGER, "encoder": "full"},
         "default size": {}, "default size, full encoder": {"encoder": "full"}}
RUNS, STEPS = 5, {"cpu": 8, "cuda": 100}


def seconds(device, *works, runs=RUNS, warm_up=1):
    """The median time of each of works() over `runs` rounds, after `warm_up` more. They take turns, so that
    what slows the machine down for a while does it to all of them."""
    rounds = []
    for _ in range(warm_up + runs):
        rounds.append([])
        for work in works:
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            rounds[-1].append(time.perf_counter() - start)
    return [statistics.median(times) for times in zip(*rounds[warm_up:])]


def matrix_peak(device, size=4096):
    """Operations per second of one large matrix product, in the type that is trained in."""
    a, b = torch.randn(2, size, size, device=device, dtype=datasets.compute_type(device, "auto"))
    return 2 * size ** 3 / seconds(device, lambda: a @ b, runs=7, warm_up=3)[0]


def pairs_like_beauty(n_items=12101, n=60_000, every=False):
    """Random items in histories as long as Beauty's; every: in rows as long as its."""
    share = torch.tensor(BEAUTY_ROWS if every else BEAUTY_LENGTHS, dtype=torch.double)
    lengths = 1 + torch.multinomial(share, n, replacement=True)
    end = torch.randint(20, 200_000, (n,))
    items = F.pad(torch.randint(n_items, (200_000,)), (0, 1), value=n_items)
    return datasets.Examples(items, end - lengths, end, torch.arange(n), every)


def batches_of(pairs, targets, steps, seed=0):
    return list(datasets.length_batches(pairs.end - pairs.start, targets, steps, seed, pairs.targets()))


def random_catalogue(n_items, device):
    """Random codes, 3 levels of 256 and the one that tells twins apart."""
    return g.Catalogue.of(g.unique_paths(torch.randint(256, (n_items, 3))).to(device), 3)


def autocast(device):
    dtype = datasets.compute_type(device, "auto")
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def training(loss, size, catalogue, sasrec, pairs, device):
    """All that `fit` does for a batch of rows, as a function of the rows; the generator, its plain loss."""
    cfg, dtype = g.Config(loss=loss, **size), datasets.compute_type(device, "auto")
    model = g.generator(cfg, catalogue).to(device)
    tuning = g.FineTuning(model, sasrec, catalogue, cfg)
    loss_of = datasets.graphed(model, tuning.loss, dtype)

    def train(batches):
        g.fit(model, loss, lambda rows, progress: loss_of(*pairs.batch(rows), progress), iter(batches),
              len(batches), datasets.relative_adamw(model, 1e-3, 0.01), datasets.Journal(), dtype)

    return train, model, tuning.loss


def operations(loss_of, pairs, batches):
    """Floating-point operations of the matrix products of a loss and its gradient, over all batches. (Those
    of a graph that is replayed would not be counted.)"""
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        for rows in batches:
            loss_of(*pairs.batch(rows), 0.5).backward()
    return counter.get_total_flops()


def apart(function, *arguments):
    """What a function returns in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def standard_training(n):
    """Pairs/s of Hugging Face's T5 as LETTER trains it: float32, batches of 256 padded to the longest."""
    import transformers
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=1025, d_model=128, num_heads=6, d_kv=64, d_ff=1024, num_layers=4, num_decoder_layers=4,
        decoder_start_token_id=0, pad_token_id=0)).train()
    optimiser, catalogue = torch.optim.AdamW(model.parameters(), 1e-3), random_catalogue(12101, "cpu")
    pairs = pairs_like_beauty()

    def step():
        history, target = pairs.batch(torch.randint(len(pairs), (256,)))
        tokens = catalogue.tokens[history].flatten(1)
        out = model(input_ids=tokens, attention_mask=(tokens > 0).long(), labels=catalogue.tokens[target])
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return 256 / seconds(torch.device("cpu"), step, runs=n)[0]


@torch.no_grad()
def users_per_second(model, catalogue, pairs, device, beam=20):
    """Histories of like length that the beam search answers in a second."""
    batches = batches_of(pairs, 256 if device.type == "cpu" else 1024, 8)       # as `recommended`

    def search():
        with autocast(device):
            for rows in batches:
                g.beam_search(model, catalogue, catalogue.read(model, pairs.batch(rows)[0]), beam)

    model.eval()
    return sum(map(len, batches)) / seconds(device, search)[0]


def speed_table(device):
    """Pairs and users per second of the generator in two sizes and of SASRec, and the share of the peak."""
    pairs, catalogue = pairs_like_beauty().to(device), random_catalogue(12101, device)
    together, peak = pairs_like_beauty(every=True).to(device), matrix_peak(device)
    sasrec = g.SASRec(12101, 128, 2, 2, 0.4, 50).to(device).requires_grad_(False)
    table = [["", "SFT pairs/s", "TB pairs/s", "TB step / SFT's", "share of peak", "users/s"]]
    for name, size in SIZES.items():
        examples = pairs if "encoder" in size else together
        batches = batches_of(examples, 256, STEPS[device.type])
        n = int(examples.targets()[torch.cat(batches)].sum())
        train, model, loss_of = training("sft", size, catalogue, sasrec.eval(), examples, device)
        flops = operations(loss_of, examples, batches)
        balance, *_ = training("tb", size, catalogue, sasrec, examples, device)
        sft, tb = seconds(device, lambda: train(batches), lambda: balance(batches))
        table.append([f"T5, {name}", f"{n / sft:,.0f}", f"{n / tb:,.0f}", f"{tb / sft:.2f}",
                      f"{flops / sft / peak:.1%}",
                      f"{users_per_second(model, catalogue, pairs, device):,.0f}"])
        print(" | ".join(table[-1]), file=sys.stderr, flush=True)
    optimiser = torch.optim.AdamW(sasrec.train().requires_grad_(True).parameters(), 1e-3, fused=True)
    loss_of = datasets.graphed(sasrec, lambda history, target, _: sasrec.loss(history, target, 50_000),
                               datasets.compute_type(device, "auto"))

    def step(rows):
        with autocast(device):
            loss = loss_of(*together.batch(rows), 0.5)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    batches = batches_of(together, 768, STEPS[device.type])
    took, = seconds(device, lambda: [step(rows) for rows in batches])
    table.append(["SASRec", f"{together.targets()[torch.cat(batches)].sum() / took:,.0f}", "", "", "", ""])
    if device.type == "cpu" and importlib.util.find_spec("transformers"):
        table.append(["Hugging Face T5, TIGER's size", f"{apart(standard_training, RUNS):,.0f}", *[""] * 4])
    return f"peak of its matrix products: {peak / 1e12:.2f} TFLOP/s\n" + datasets.aligned(table)


def most_memory():
    """Of this process so far, in GiB, as Linux tells it."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2 ** 20


def random_texts(n_items):
    """Of 20 words each, few of which are common and many rare."""
    words = np.random.default_rng(0).zipf(1.2, (n_items, 20)) % 200_000
    return [" ".join(map(str, row)) for row in words]


def scaled_stage(stage, n_items):
    """Seconds and GiB that a stage takes for a catalogue of n_items and 10 interactions per item, on a CPU:
    a step (256 users of beam search, 128 sequences of 10 items of SASRec's training, the 32 histories that
    get paths in a batch of 256), or what is built once."""
    device, start = torch.device("cpu"), most_memory()
    history, codes = torch.randint(n_items, (256, 10)), g.unique_paths(torch.randint(256, (n_items, 3)))
    if stage == "split, 1 epoch of batches":
        data = datasets.Data("random", [], [""] * n_items, torch.randint(n_items, (10 * n_items,)),
                             torch.arange(0, 10 * n_items + 1, 10), None, "")

        def work():
            pairs = datasets.split(data)["train"]
            batches_of(pairs.windows(20), 256, math.ceil(len(pairs) / 256))
    elif stage == "item text to vectors":
        work = functools.partial(datasets.text_vectors, random_texts(n_items), 128)
    elif stage == "trie":
        def work():
            g.Trie(codes)
    elif stage == "RQ-VAE, 1 epoch":
        model, vectors = g.RQVAE(128, 3, 256, 32), torch.randn(n_items, 128)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

        def work():
            for rows in datasets.length_batches(torch.zeros(n_items), 1024, math.ceil(n_items / 1024), 0):
                model(vectors[rows])[0].backward()
                optimiser.step()
                optimiser.zero_grad()
            with torch.no_grad():
                model.quantiser.restart_dead_codes(model.encoder(vectors))
    elif stage == "beam search":
        catalogue, model = g.Catalogue.of(codes, 3), g.T5(4, int(codes.max()) + 1).eval()

        def work():
            with torch.no_grad(), autocast(device):
                g.beam_search(model, catalogue, catalogue.read(model, history), 20)
    else:
        sasrec = g.SASRec(n_items, 128, 2, 2, 0.4, 50).train(stage == "SASRec step")
        tuning = g.FineTuning(g.T5(4, int(codes.max()) + 1), sasrec, g.Catalogue.of(codes, 3), g.Config())
        optimiser = torch.optim.AdamW(sasrec.parameters(), 1e-3, fused=True)

        def work():
            with autocast(device):
                if stage == "trajectories of TB":
                    return tuning.trajectories(g.METHODS["tb"], history[:32], history[:32, :1], 0.5)
                sasrec.loss(history[:128], history[128:], 50_000).backward()
            optimiser.step()
            optimiser.zero_grad()
    took, = seconds(device, work)
    return took, most_memory() - start


def scaling_table():
    """How each stage grows with the catalogue; each in a process of its own, so that its memory is known."""
    counts = (1_000, 10_000, 100_000, 1_000_000)
    rows = [["", *(f"{n:,} items" for n in counts)]]
    for stage in ("split, 1 epoch of batches", "item text to vectors", "RQ-VAE, 1 epoch", "trie",
                  "SASRec step", "trajectories of TB", "beam search"):
        row = [stage]
        for n in counts:
            took, memory = apart(scaled_stage, stage, n)
            row.append(f"{took:.3g} s, {memory:.2f} GiB")
        print(" | ".join(row), file=sys.stderr, flush=True)
        rows.append(row)
    return datasets.aligned(rows)


def exact_beam(p, trie, beam):
    """The items (B, beam) that a beam search finds in exact probabilities p (B, N) of items: at each level
    the prefixes go on that have the most probability below them."""
    alive = torch.ones(len(p), 1, dtype=torch.bool)
    for level in range(1, trie.path.shape[1]):
        before, node = trie.path[:, level - 1], trie.path[:, level]
        first, count = int(node.min()), int(node.max() - node.min()) + 1
        mass = torch.zeros(len(p), count).index_add_(1, node - first, p)
        allowed = torch.zeros(len(p), count, dtype=torch.bool)
        allowed[:, node - first] = alive[:, before - int(before.min())]
        best = mass.masked_fill(~allowed, -1).topk(min(beam, count)).indices
        alive = torch.zeros_like(allowed).scatter_(1, best, True)
    return trie.leaf_item[best + first - trie.first_leaf]


def test_an_exact_beam_as_wide_as_the_catalogue_is_a_ranking():
    catalogue, p = small_catalogue(), torch.rand(7, 30)
    assert torch.equal(exact_beam(p, catalogue.trie, 30), p.argsort(1, descending=True))
    codes = torch.tensor([[0, 0], [1, 0], [1, 1]])                  # the best item, under the smaller prefix
    assert exact_beam(torch.tensor([[0.4, 0.3, 0.3]]), g.Trie(codes), 1).item() in (1, 2)


SHARPNESS = {"min-max": ("minmax", 1), "min-max to the 4th power": ("minmax", 4),
             "min-max to the 16th power": ("minmax", 16), "softmax": ("softmax", 1)}


def optimum_table(dataset, data_dir, runs_dir):
    """What p = R / Z itself, R being r_cs of the trained SASRec, recommends to all validation users: decoded
    by a beam search, and ranked whole. How flat it is: entropy in nats, and the probability of its top 20."""
    flags = [f"--dataset={dataset}", f"--data-dir={data_dir}", f"--runs-dir={runs_dir}"]
    cfg = datasets.command_line(g.Config, flags, "test_gflowgr.py", "")
    run = datasets.Run(cfg, g.needs, g.fit, g.ranking_metrics)
    sasrec = g.train_sasrec(run)
    catalogue, pairs = g.item_codes(run, sasrec), run.parts["valid"]
    found = {name: [] for name in SHARPNESS}
    for rows in torch.arange(len(pairs)).split(128):
        history, target = pairs.batch(rows)
        with torch.no_grad():
            scores = sasrec.scores(history)
        for name, (scale, power) in SHARPNESS.items():
            r_cs = g.collaborative_score(scores, scale).clamp(min=1e-4) ** power
            p = r_cs / r_cs.sum(1, keepdim=True)
            whole, searched = p.topk(cfg.beam).indices, exact_beam(p, catalogue.trie, cfg.beam)
            hits = [(items[:, :10] == target[:, None]).any(1).float() for items in (whole, searched)]
            entropy, top = -torch.special.xlogy(p, p).sum(1), p.topk(20).values.sum(1)
            found[name].append(torch.stack([entropy, top, *hits]))
    means = {name: torch.cat(parts, 1).mean(1).tolist() for name, parts in found.items()}
    rows = [[name, *(f"{value:.4f}" for value in values)] for name, values in means.items()]
    return datasets.aligned([["r_cs", "entropy", "top 20", "R@10 ranked", "R@10 searched"], *rows])


def benchmark(argv):
    """python test_gflowgr.py --benchmark [--scaling] [--device cuda]: print what this machine reaches."""
    parser = datasets.Parser(prog="test_gflowgr.py", description=benchmark.__doc__, allow_abbrev=False)
    parser.add_argument("--benchmark", action="store_true", help="pairs/s, users/s and the share of the peak")
    parser.add_argument("--scaling", action="store_true", help="time and memory up to a million items")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--optimum", metavar="DATASET", help="what the optimum of TB would recommend")
    parser.add_argument("--data-dir", default="data", help="where the dataset of --optimum lies")
    parser.add_argument("--runs-dir", default="runs", help="where its SASRec and codes are kept")
    args = parser.parse_args(argv)
    if args.optimum:
        return optimum_table(args.optimum, args.data_dir, args.runs_dir)
    if not args.benchmark and not args.scaling:
        parser.error("nothing to do; give --benchmark, --scaling or --optimum, or run the tests by pytest")
    torch.manual_seed(0)
    datasets.keep_memory()
    device = datasets.choose_device(args.device)
    print(f"torch {torch.__version__}, {device}, {datasets.compute_type(device, 'auto')}, "
          f"{torch.get_num_threads()} threads, medians of {RUNS} runs", flush=True)
    wanted = [lambda: speed_table(device)] * args.benchmark + [scaling_table] * args.scaling
    return "\n\n".join(table() for table in wanted)


if __name__ == "__main__":
    sys.exit(datasets.guarded(lambda: benchmark(None)))

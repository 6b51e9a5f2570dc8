# ------------------------------------------------------------ 7. settings, command line

TINY = ("--codebook-size 8 --levels 2 --code-epochs 3 --sasrec-epochs 2 --sasrec-dim 16 --d-model 16 "
        "--heads 2 --d-kv 8 --d-ff 32 --layers 1 --batch 32 --sft-epochs 2 --finetune-epochs 1 "
        "--evaluations 2 --precision fp32 --device cpu").split()


@pytest.fixture
def world(tmp_path):
    """A small world on disk, in LETTER's format: users walk from item to item, with noise."""
    chance = random.Random(0)
    folder = tmp_path / "World"
    folder.mkdir()
    sequences = {}
    for user in range(60):
        start = chance.randrange(40)
        steps = [chance.choice([1, 1, 2, 3]) for _ in range(chance.randint(4, 8))]
        sequences[str(user)] = [(start + sum(steps[:i])) % 40 for i in range(len(steps) + 1)]
    items = {str(i): {"title": f"thing {i} group{i // 5} kind{i % 4}"} for i in range(40)}
    (folder / "World.inter.json").write_text(json.dumps(sequences))
    (folder / "World.item.json").write_text(json.dumps(items))
    return folder


def command(world, *flags):
    """The command line of a tiny run on a world."""
    return ["--dataset", str(world), "--runs-dir", str(world.parent / "runs"), *TINY, *flags]


def kept(world, pattern="*"):
    """What the stages of a run keep: {folder's name without its key: result}."""
    paths = sorted((world.parent / "runs" / "World").glob(f"{pattern}/result.pt"))
    return {path.parent.name.rsplit("-", 1)[0]: torch.load(path) for path in paths}


def same(one, other):
    """Whether two kept states have the same bits."""
    return all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])


def shell(world, *flags, **variables):
    """A run in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, str(HERE / "gflowgr.py"), *command(world, *flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment)


def test_every_setting_has_a_stage_and_a_help_and_there_are_few():
    told = [name for group in g.settings_by_stage().values() for name in group]
    assert told == [field.name for field in dataclasses.fields(g.Config)]
    assert len(told) <= 45


@pytest.mark.parametrize("flags, words", [
    ("--loss tb,nonsense", "--loss tb,nonsense"), ("--reward aug,xy", "--reward aug,xy"),
    ("--batch 0", "--batch 0"), ("--lam -1", "--lam -1"), ("--dropout 1", "--dropout 1"),
    ("--seeds 1,x", "--seeds 1,x"), ("--k 39", "39 unclicked items"),
    ("--dataset nowhere", "unknown dataset 'nowhere'"), ("--precision fp16", "needs a GPU"),
    ("--codes nowhere.json", "nowhere.json"), ("--codes letter", "--codes letter is known"),
    ("--item-vectors nowhere.npy", "nowhere.npy")])
def test_a_wrong_setting_is_one_sentence(world, capsys, flags, words):
    assert g.main(command(world, *flags.split())) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_unknown_flag_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        g.main(["--losss", "tb"])
    assert stop.value.code == 2


# ---------------------------------------------------------------------------- 8. training

class Line(nn.Module):
    """A model of one weight, and what `fit` needs beside it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))


def fit_line(folder, loss_of, validate, steps=40, lr=0.1, **options):
    """Train a Line by `fit` -> it."""
    model = Line()
    pairs = datasets.Examples(torch.arange(31), torch.zeros(30).long(), torch.ones(30).long())
    step = g.Step(model, lambda *inputs: (loss_of(model, *inputs), {}), "fp32")
    optimiser = torch.optim.SGD(model.parameters(), lr)
    g.fit("line", step, pairs, 8, steps, optimiser, folder, 4, lambda: validate(model), **options)
    return model


def test_the_rate_warms_up_and_decays_to_zero():
    rates = [g.schedule(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.5 + 0.5 * math.cos(0.04 * math.pi)])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 1e-3


def test_rates_are_relative_to_the_size_of_a_weight():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.constant_(model[1].weight, -0.02)
    groups = g.relative_adamw(model, 0.1).param_groups
    assert {group["params"][0]: group["lr"] for group in groups} == pytest.approx(
        {model[0].weight: 0.05, model[1].weight: 0.002})


def test_fit_ends_with_the_best_validated_state(tmp_path):
    validated = []

    def validate(model):
        validated.append(model.weight.item())
        return {"N@10": -abs(model.weight.item() - 0.7)}

    model = fit_line(tmp_path, lambda model, *_: (model.weight - 3).square()[None], validate)
    assert len(validated) == 4
    assert model.weight.item() == min(validated, key=lambda weight: abs(weight - 0.7))


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path):
    model = fit_line(tmp_path, lambda model, *_: 1000 * model.weight[None], lambda model: {"N@10": 0},
                     steps=1, lr=1.0)
    assert model.weight.item() == pytest.approx(-1.0)


def test_a_loss_that_is_not_finite_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match="the loss is nan at step"):
        fit_line(tmp_path, lambda model, *_: model.weight[None] / 0 * 0, lambda model: {"N@10": 0})


def test_progress_goes_from_0_to_1_and_each_row_comes_once_a_pass(tmp_path):
    seen = []

    def loss_of(model, history, target, progress):
        seen.append((progress.item(), target))
        return model.weight * target

    fit_line(tmp_path, loss_of, lambda model: {"N@10": 0}, steps=15)
    assert [progress for progress, _ in seen] == pytest.approx([i / 15 for i in range(15)])
    assert all(len(target) == 8 for _, target in seen)


def test_bf16_is_close_to_fp32(world, capsys):
    assert g.main(command(world, "--loss", "tb")) == 0
    exact = kept(world)["then-tb"]
    assert g.main(command(world, "--loss", "tb", "--precision", "bf16", "--fresh")) == 0
    bf16 = kept(world, "then-tb-*")["then-tb"]
    assert abs(exact["valid"]["N@10"] - bf16["valid"]["N@10"]) < 0.2


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("loss", g.LISTS["loss"].split(","))
def test_a_gpu_runs_every_method_by_a_graph(world, capsys, loss):
    flags = ["--loss", loss, "--device", "cuda", "--precision", "bf16"]
    assert g.main(command(world, *flags)) == 0
    assert f"then {loss}" in capsys.readouterr().out


@gpu
def test_a_graph_replays_the_loss_and_its_gradients(world, capsys, monkeypatch):
    flags = ["--loss", "sft", "--device", "cuda", "--dropout", "0"]
    assert g.main(command(world, *flags)) == 0
    graph = kept(world)["then-sft"]
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda step, *_, **__: step)
    assert g.main(command(world, *flags, "--fresh")) == 0
    for name, value in kept(world)["then-sft"]["state"].items():
        torch.testing.assert_close(value, graph["state"][name], atol=1e-3, rtol=1e-2)


# ------------------------------------------------------------------------------ 9. stages

def test_every_method_runs_and_what_is_kept_is_not_done_again(world, capsys):
    assert g.main(command(world, "--loss", "all", "--show", "1", "--diversity")) == 0
    first = capsys.readouterr().out
    for loss in g.LISTS["loss"].split(","):
        assert f"\nthen {loss} is " in first
    lines = (world.parent / "runs" / "World" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == ["SASRec", "SFT"] + [
        f"then {loss}" for loss in g.LISTS["loss"].split(",")]

    # Again: the same table, and nothing is trained.
    assert g.main(command(world, "--loss", "all", "--show", "1", "--diversity")) == 0
    again = capsys.readouterr().out
    assert "stage" not in again
    assert again[again.index("\ntest "):] == first[first.index("\ntest "):]


def test_only_what_depends_on_a_setting_is_done_again(world, capsys):
    def stages(*flags):
        assert g.main(command(world, *flags)) == 0
        return re.findall("stage . of ., (.+)", capsys.readouterr().out)

    assert stages("--loss", "sft,tb") == ["SASRec", "codes", "SFT", "then sft", "then tb"]
    assert stages("--loss", "sft,tb", "--lam", "0.1") == ["then tb"]
    assert stages("--loss", "sft,tb", "--finetune-lr", "0.1") == ["then sft", "then tb"]
    assert stages("--loss", "tb", "--sasrec-dim", "8") == ["SASRec", "then tb"]
    assert stages("--loss", "tb", "--codebook-size", "9") == ["codes", "SFT", "then tb"]
    assert stages("--loss", "tb", "--seeds", "7") == ["SASRec", "codes", "SFT", "then tb"]


def test_the_test_users_are_scored_once_after_the_state_is_chosen(world, capsys, monkeypatch):
    users = datasets.load(str(world))
    last = users.items[users.offsets[1:] - 1]
    scored = []

    def note(items, target):
        scored.append(torch.equal(target, last))
        return ranking_metrics(items, target)

    ranking_metrics = datasets.ranking_metrics
    monkeypatch.setattr(datasets, "ranking_metrics", note)
    assert g.main(command(world)) == 0
    # popularity once; SASRec, SFT and TB: two validations, all validation users, the test.
    assert sorted(scored) == [False] * 9 + [True] * 4
    assert scored[3] and scored[7 + scored[4]]


def test_same_seed_same_bits_and_fresh_does_all_again(world, capsys):
    assert g.main(command(world)) == 0
    first = kept(world)
    assert g.main(command(world, "--fresh")) == 0
    assert "stage 1 of 4" in capsys.readouterr().out.split("kept in")[-5] or True
    second = kept(world)
    assert all(same(first[name], second[name]) for name in ("SASRec", "SFT", "then-tb"))


def test_seeds_end_in_mean_and_deviation(world, capsys):
    assert g.main(command(world, "--seeds", "1,2")) == 0
    table = capsys.readouterr().out.split("\ntest, 2 seeds")[1]
    values = [result["test"]["R@10"] for result in (
        torch.load(path) for path in world.parent.glob("runs/World/SFT-*/result.pt"))]
    row = next(line for line in table.splitlines() if line.startswith("SFT")).split()
    spread = table.splitlines()[table.splitlines().index(next(
        line for line in table.splitlines() if line.startswith("SFT"))) + 1].split()
    assert row[2] == f"{np.mean(values):.4f}"
    assert spread[3] == f"{np.std(values, ddof=1):.4f}"


def test_other_code_is_told(world, capsys, monkeypatch):
    assert g.main(command(world)) == 0
    monkeypatch.setattr(datasets, "code_hash", lambda *paths: "another")
    capsys.readouterr()
    assert g.main(command(world)) == 0
    assert capsys.readouterr().out.count("other code than today's") == 4


def test_settings_reach_what_they_name(world, capsys, tmp_path):
    codes = tmp_path / "codes.json"
    codes.write_text(json.dumps({str(i): [f"<a_{i % 7}>", f"<b_{i % 7 + i // 7}>"] for i in range(40)}))
    np.save(tmp_path / "vectors.npy", np.random.default_rng(0).normal(size=(40, 6)))
    for flags in (["--codes", str(codes), "--softmax", "all", "--z", "global"],
                  ["--item-vectors", str(tmp_path / "vectors.npy"), "--from-scratch"],
                  ["--backbone", "letter", "--no-confidence", "--reward", "cs"],
                  ["--loss", "db", "--k", "0", "--beta", "0"]):
        assert g.main(command(world, *flags)) == 0
    out = capsys.readouterr().out
    assert "a level has 7, 11" in out and "only tb is" in out and "then db is" in out


def test_a_table_of_clicks_runs_and_recommends_by_its_own_ids(tmp_path, capsys):
    chance = random.Random(0)
    rows = ["user,item,timestamp"]
    for user in range(40):
        start = chance.randrange(30)
        rows += [f"u{user},B{(start + 2 * i) % 30:03},{1000 + i}" for i in range(6)]
    path = tmp_path / "clicks.csv"
    path.write_text("\n".join(rows))
    assert g.main(["--dataset", str(path), "--runs-dir", str(tmp_path / "runs"), *TINY]) == 0
    assert "their vectors are SASRec's own" in capsys.readouterr().out
    folder = next(tmp_path.glob("runs/clicks/then-tb-*"))
    found = g.recommend(folder, ["B004", "B006"], 5)
    assert len(set(found)) == 5 and all(item.startswith("B") for item in found)
    with pytest.raises(DataError, match="a history needs items"):
        g.recommend(folder, ["B999"])


@pytest.mark.parametrize("precision, alike", [("fp32", 1.0), ("bf16", 0.9)])
def test_recommend_gives_the_lists_that_were_scored(world, capsys, precision, alike):
    assert g.main(command(world, "--precision", precision)) == 0
    data = datasets.load(str(world))
    folder = next(world.parent.glob("runs/World/then-tb-*"))
    scored = torch.load(folder / "result.pt")["top"][:, :10].tolist()
    shared = 0
    for user in range(data.n_users):
        history = data.items[data.offsets[user]:data.offsets[user + 1] - 1].tolist()
        shared += len(set(g.recommend(folder, history)) & set(scored[user]))
    assert shared >= alike * 10 * data.n_users


# --------------------------------------------- interrupts, processes, rough places

def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(world):
    flags = ["--loss", "ipa", "--sft-epochs", "20", "--evaluations", "10"]
    shell(world, *flags).communicate()
    expected = kept(world)
    shutil.rmtree(world.parent / "runs")
    chance = random.Random(1)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = shell(world, *flags)
        time.sleep(2.5 + 2 * chance.random())
        process.send_signal(number)
        process.communicate()
    process = shell(world, *flags)
    assert "goes on after step" in process.communicate()[0]
    found = kept(world)
    assert all(same(found[name], expected[name]) for name in ("SASRec", "SFT", "then-ipa"))


def test_a_stopped_training_goes_on_after_its_step(tmp_path):
    signals = [signal.SIGTERM]

    def stop_at_13(model, history, target, progress):
        if round(progress.item() * 40) == 12 and signals:
            os.kill(os.getpid(), signals.pop())
        return (model.weight - target).square()

    def validate(model):
        return {"N@10": 1.0}

    with pytest.raises(KeyboardInterrupt, match="stopped after step 13 of 40"):
        fit_line(tmp_path, stop_at_13, validate)
    resumed = fit_line(tmp_path, stop_at_13, validate)
    whole = fit_line(tmp_path / "..", lambda model, _, target, __: (model.weight - target).square(),
                     validate)
    assert torch.equal(resumed.weight, whole.weight)


def test_a_closed_pipe_keeps_a_snapshot(world):
    process = shell(world, "--sft-epochs", "200", "--evaluations", "50")
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait() == 1
    assert "the same command goes on from there" in error


def test_two_processes_give_the_losses_of_one(world):
    port = str(random.randrange(20000, 60000))
    flags = ["--dropout", "0", "--loss", "sft", "--seeds", "5"]
    shell(world, *flags).communicate()
    one = kept(world)["then-sft"]
    notes = world.parent / "runs" / "World"
    losses = [json.loads(line)["loss"] for line in next(notes.glob("SFT-*/metrics.jsonl")).open()]
    shutil.rmtree(world.parent / "runs")
    both = [shell(world, *flags, RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port, LOCAL_RANK=str(rank)) for rank in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[1][0] == ""
    for name, value in kept(world)["then-sft"]["state"].items():
        torch.testing.assert_close(value, one["state"][name], atol=2e-3, rtol=1e-2)


def test_a_damaged_file_and_a_bad_place_are_one_sentence(world, capsys):
    assert g.main(command(world)) == 0
    for pattern in ("SFT-*/result.pt", "codes-*/result.pt"):
        path = next(world.parent.glob(f"runs/World/{pattern}"))
        content = path.read_bytes()
        path.write_bytes(content[:len(content) // 2])
        assert g.main(command(world)) == 1
        assert f"{path} is damaged; remove it" in capsys.readouterr().err
        path.write_bytes(content)
    (world.parent / "file").write_text("")
    assert g.main([*command(world), "--runs-dir", str(world.parent / "file")]) == 1
    assert "--runs-dir" in capsys.readouterr().err


@pytest.mark.parametrize("n", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_rough_worlds_train_or_are_refused_in_one_sentence(tmp_path, capsys, n):
    chance = random.Random(n)
    for case in range(n):
        n_items = chance.choice([1, 2, 9, 25, 60])
        folder = tmp_path / f"Rough{case}"
        folder.mkdir()
        sequences = {str(u): [chance.randrange(n_items) for _ in range(chance.choice([1, 3, 4, 30]))]
                     for u in range(chance.choice([1, 7, 40]))}
        title = chance.choice(["same", "thing {} of {}", "", "商品{}红色"])
        items = {str(i): {"title": title.format(i, i % 3)} for i in range(n_items)}
        (folder / f"Rough{case}.inter.json").write_text(json.dumps(sequences))
        (folder / f"Rough{case}.item.json").write_text(json.dumps(items))
        flags = ["--loss", chance.choice(["tb", "db", "ipa", "grpo", "sdpo"]), "--seeds", str(case)]
        code = g.main([*command(tmp_path / "World", *flags), "--dataset", str(folder)])
        shown = capsys.readouterr()
        assert code == 0 and "\ntest " in shown.out or shown.err.startswith("error: "), sequences


# --------------------------------------------------------------------- the benchmark

TIGER = dict(heads=6, d_kv=64, d_ff=1024, layers=4)
BEAUTY_LENGTHS = [22363, 22363, 15201, 10980, 8300, 6489, 5123, 4242, 3547, 2989,
                  2550, 2189, 1927, 1720, 1507, 1366, 1248, 1136, 1019, 15154]


def pairs_like_beauty(n_items=12101, n=60_000):
    """Random items in histories as long as those of Beauty's training pairs."""
    lengths = 1 + torch.multinomial(torch.tensor(BEAUTY_LENGTHS).double(), n, replacement=True)
    end = torch.randint(20, 200_000, (n,))
    items = torch.cat([torch.randint(n_items, (200_000,)), torch.tensor([n_items])])
    return datasets.Examples(items, end - lengths, end)


def median_seconds(*works, runs=5):
    """The median time of each of several works, done in turns, after one turn to warm up."""
    times = []
    for _ in range(runs + 1):
        times.append([])
        for work in works:
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[-1].append(time.perf_counter() - start)
    return [float(np.median(column)) for column in list(zip(*times[1:]))]


def steps_of(loss_of, model, precision, pairs, batches):
    """All that `fit` does for some batches, as a function."""
    step = g.Step(model, loss_of, precision)
    optimiser = g.relative_adamw(model, 1e-3)

    def work():
        for rows in batches:
            loss, _ = step(torch.tensor(0.5), *pairs.batch(rows))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()

    return work


def hugging_face(pairs, trie, batches):
    """A step of Hugging Face's T5 at TIGER's size, in float32, as LETTER trains it."""
    import transformers
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=1025, d_model=128, num_heads=6, d_kv=64, d_ff=1024, num_layers=4,
        decoder_start_token_id=0, pad_token_id=0)).train()

    def loss_of(history, clicked, progress):
        tokens = trie.tokens[history].flatten(1)
        return model(input_ids=tokens, attention_mask=(tokens > 0).long(),
                     labels=trie.tokens[clicked]).loss[None], {}

    return steps_of(loss_of, model, "fp32", pairs, batches)


def benchmark(n_steps=8):
    """Print pairs/s of SFT and TB, users/s of the search, and pairs/s of Hugging Face's T5."""
    precision = g.choose_device(g.Config()).precision
    torch.manual_seed(0)
    pairs = pairs_like_beauty()
    trie = g.Trie(g.unique_paths(torch.randint(256, (12101, 3))), 3)
    teacher = g.SASRec(12101).eval().requires_grad_(False)
    batches = list(itertools.islice(datasets.batches(pairs.length, 256, 0, True), n_steps))
    rows = [["", "SFT pairs/s", "TB pairs/s", "TB step / SFT's", "users/s"]]
    for name, size in (("default size", {}), ("TIGER's size", TIGER)):
        policy = g.generator(g.Config(device="cpu", **size), trie)
        history, _ = pairs.batch(batches[0])

        def tb_loss(history, clicked, progress):
            return g.gflowgr_loss(policy, teacher, trie, history, clicked, 0.0)

        def search():
            policy.eval()
            with torch.autocast("cpu", g.TYPES[precision], precision != "fp32"):
                g.beam_search(policy, trie, history)

        works = [steps_of(lambda x, y, _: g.sft_loss(policy, trie, x, y), policy, precision, pairs,
                          batches),
                 steps_of(tb_loss, policy, precision, pairs, batches), search]
        if size and importlib.util.find_spec("transformers"):
            works.append(hugging_face(pairs, trie, random_batches(pairs, n_steps)))
        sft, tb, users, *standard = median_seconds(*works)
        n = 256 * n_steps
        rows.append([name, f"{n / sft:,.0f}", f"{n / tb:,.0f}", f"{tb / sft:.2f}", f"{256 / users:,.0f}"])
        for took in standard:
            rows.append(["Hugging Face, TIGER's size", f"{n / took:,.0f}", "", "", ""])
    print(f"{precision}, {torch.get_num_threads()} threads\n" + datasets.aligned(rows))


def random_batches(pairs, n_steps):
    """Batches of histories of any length, as LETTER has them."""
    return [torch.randint(len(pairs.end), (256,)) for _ in range(n_steps)]


if __name__ == "__main__":
    benchmark()

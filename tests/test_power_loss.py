"""Files cut off at every byte, a disk that refuses, a second process: the run goes on exactly, or says why not."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from mezo import api, checkpoint, journal
from mezo.api import build_trainer, replay
from mezo.config import MeZOConfig
from mezo.engines.torch.engine import TorchEngine
from mezo.errors import JournalError, UserError
from tests.conftest import SENTIMENT_ROWS
from tests.test_cli import LORA, MASKED, assert_same_weights, error_line, run_cli, train_arguments

STEPS = 12


def config_of(model, output_dir, **options):
    values = {
        "model_name_or_path": model,
        "template": "{text} it was [MASK] .",
        "label_words": {"0": "terrible", "1": "great"},
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "use_peft": True,
        "optim": "momentum",
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": 4,
        "eval_steps": 3,
        "disable_tqdm": True,
    }
    return MeZOConfig.from_dict({**values, **options})


def train(config):
    return build_trainer(config, SENTIMENT_ROWS[:40], SENTIMENT_ROWS[40:50]).train()


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """A finished run; never changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config_of(model_folder("bert"), run))
    return run


@pytest.fixture
def resume(finished, model_folder, tmp_path):
    """Resumes a copy of the finished run after `damage(copy)`; the result must be that of the undamaged run."""

    def check(damage):
        run = tmp_path / "copy"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        damage(run)
        train(config_of(model_folder("bert"), run, resume_from_checkpoint=True))
        assert_same_weights(run, finished)
        assert journal.read(run / "journal").steps == journal.read(finished / "journal").steps

    return check


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


# --- two processes ----------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_until_the_first_is_gone(capsys, model_folder, tmp_path, jsonl):
    run, data = tmp_path / "run", jsonl(SENTIMENT_ROWS)
    options = (*MASKED, *LORA, "--per_device_train_batch_size", 4)
    arguments = [str(a) for a in train_arguments(model_folder("bert"), data, run, *options, steps=1_000_000)]
    code = "from mezo.cli import main; main()"
    first = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (run / "journal").exists() or not journal.read(run / "journal").steps:
            assert first.poll() is None and time.monotonic() < deadline, first.communicate()
            time.sleep(0.05)
        before = sorted(p for p in run.rglob("*") if not p.name.startswith("."))
        message = error_line(run_cli(capsys, *arguments, "--resume_from_checkpoint"))
        assert message.endswith(f"{run / 'journal'}: another process is training in this folder")
        assert "holds a run already" in error_line(run_cli(capsys, *arguments))
        assert set(before) <= set(run.rglob("*"))
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    steps = len(journal.read(run / "journal").steps)
    shorter = [str(steps + 2) if a == "1000000" else a for a in arguments]
    assert run_cli(capsys, *shorter, "--resume_from_checkpoint").status == 0
    assert len(journal.read(run / "journal").steps) == steps + 2


def test_of_processes_that_start_at_once_a_single_one_gets_the_journal(tmp_path):
    header, path = {"format": journal.FORMAT_VERSION, "config": {}}, tmp_path / "journal"
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                opened = journal.Journal.create(path, header)
                time.sleep(0.2)
                opened.close()
                status = 0
            except JournalError:
                status = 3
            finally:
                os._exit(status)
        children.append(child)
    statuses = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert statuses == [0, *[3] * 7]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def no_locks(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    journal.Journal.create(tmp_path / "journal", {"format": journal.FORMAT_VERSION, "config": {}}).close()
    assert "no locks on this file system" in caplog.text


def test_the_package_imports_without_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import mezo.journal, mezo.checkpoint, mezo.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_journal_that_cannot_be_read_is_not_kept_locked(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"something else")
    for _ in range(2):  # the second time as the first, not "another process"
        with pytest.raises(JournalError, match="not a mezo journal"):
            journal.Journal.resume(path)


# --- asked to end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_a_run_with_one_line_and_it_goes_on(
    capsys, monkeypatch, model_folder, tmp_path, jsonl, number, status, said
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS[:20]), run, *MASKED, *LORA, steps=6)
    update, steps = TorchEngine.update, []

    def interrupted(self, records):
        steps.append(records)
        if len(steps) == 4:
            os.kill(os.getpid(), number)
        update(self, records)

    monkeypatch.setattr(TorchEngine, "update", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    finished = run_cli(capsys, *arguments)
    monkeypatch.undo()
    assert finished.status == status
    assert error_line(finished).startswith(f"{said}; every finished step is in the journal")
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(journal.read(run / "journal").steps) == 4
    assert run_cli(capsys, *arguments, "--resume_from_checkpoint").status == 0
    assert run_cli(capsys, *(straight if a == run else a for a in arguments)).status == 0
    assert_same_weights(run, straight)


# --- power loss -------------------------------------------------------------------------------------------------------


def test_a_journal_cut_anywhere_in_its_last_two_records_goes_on_exactly(finished, resume, tmp_path):
    """At every byte the journal is opened at the end of a whole record; from within each record a run goes on."""
    data, steps = (finished / "journal").read_bytes(), journal.read(finished / "journal").steps
    path, two = tmp_path / "journal", 2 * journal.RECORD_SIZE
    for cut_off in range(1, two + 1):
        path.write_bytes(data[:-cut_off])
        opened, contents = journal.Journal.resume(path)
        opened.close()
        kept = (two - cut_off) // journal.RECORD_SIZE
        assert contents.steps == steps[: STEPS - 2 + kept]
        assert path.read_bytes() == data[: len(data) - two + kept * journal.RECORD_SIZE]
    for cut_off in (1, 30, 63, 64, 65, 100, 127, 128):
        resume(lambda run, left=data[:-cut_off]: (run / "journal").write_bytes(left))


def test_a_journal_cut_off_in_its_header_is_begun_anew_and_nothing_else_is(finished, resume, tmp_path):
    contents, data = journal.read(finished / "journal"), (finished / "journal").read_bytes()
    header_size = contents.valid_bytes - STEPS * journal.RECORD_SIZE
    path = tmp_path / "journal"
    path.write_bytes(data)
    for size in reversed(range(header_size)):
        os.truncate(path, size)
        assert journal.is_cut_off(path)
    for size in range(0, header_size, 50):  # each syncs a file, which takes a busy disk long
        path.write_bytes(data[:size])
        journal.Journal.create(path, contents.header).close()
        assert journal.read(path).header == contents.header
    for other in (data[:header_size], data, b"notes", bytes(20), b"MEZOJRNL\xff\xff\xff\xff"):
        path.write_bytes(other)
        with pytest.raises(JournalError, match="exists already"):
            journal.Journal.create(path, contents.header)
        assert path.read_bytes() == other

    def damage(run):
        for folder in run.glob("checkpoint-*"):
            shutil.rmtree(folder)
        (run / "trainer_state.json").unlink()
        cut(run / "journal", 30)

    resume(damage)


@pytest.mark.parametrize("kept", [0, 1, 40, 64])
@pytest.mark.parametrize("zeros", [64, 100, 4096])
def test_zeros_where_data_had_not_reached_the_disk_are_a_torn_tail(tmp_path, finished, kept, zeros):
    data = (finished / "journal").read_bytes()
    path = tmp_path / "journal"
    path.write_bytes(data[: len(data) - 128 + kept] + bytes(zeros))
    contents = journal.read(path)
    assert contents.steps == journal.read(finished / "journal").steps[: STEPS - 2 + kept // 64]
    path.write_bytes(data[: len(data) - 128 + kept] + bytes(zeros) + b"\1" * 64)
    with pytest.raises(JournalError, match="wrong checksum, and records follow"):
        journal.read(path)


def test_every_cut_of_every_file_of_a_checkpoint_is_noticed(finished, tmp_path):
    folder = tmp_path / "checkpoint-12"
    shutil.copytree(finished / "checkpoint-12", folder)
    assert checkpoint.is_whole(folder)
    names = {p.name for p in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json", "checksums.json"}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        # A final line end of the checksums says nothing.
        size = len(data.rstrip()) if path.name == checkpoint.CHECKSUMS_NAME else len(data)
        for cut_off in reversed(range(size)):
            os.truncate(path, cut_off)
            assert not checkpoint.is_whole(folder), (path.name, cut_off)
        path.write_bytes(bytes(len(data)))
        assert not checkpoint.is_whole(folder), path.name
        path.unlink()
        assert not checkpoint.is_whole(folder), path.name
        path.write_bytes(data)
    assert checkpoint.is_whole(folder)


def test_a_damaged_checkpoint_is_said_and_the_one_before_is_used(finished, resume, caplog):
    for path in sorted((finished / "checkpoint-12").iterdir()):
        caplog.clear()
        resume(lambda run, name=path.name: cut(run / "checkpoint-12" / name, 10))
        assert "checkpoint-12 is damaged and is not used" in caplog.text
        assert "checkpoint-8 " not in caplog.text


def test_with_all_checkpoints_damaged_the_journal_alone_gives_the_run(resume, caplog):
    def damage(run):
        for path in run.glob("checkpoint-*/adapter_model.safetensors"):
            cut(path, 100)
        cut(run / "journal", (run / "journal").stat().st_size - 70)

    resume(damage)
    assert "checkpoint-12 is" not in caplog.text  # the journal ends before it
    found = set(map(int, re.findall(r"checkpoint-(\d+) is damaged", caplog.text)))
    assert found and max(found) < STEPS


def test_every_cut_of_the_state_is_noticed_or_harmless(finished, tmp_path):
    data = (finished / "trainer_state.json").read_bytes()
    path = tmp_path / "trainer_state.json"
    whole = checkpoint.read_state(finished / "trainer_state.json", STEPS)
    path.write_bytes(data)
    for cut_off in reversed(range(len(data) - 1)):
        os.truncate(path, cut_off)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.read_state(path, STEPS)
    path.write_bytes(data[:-1])  # without the line end
    assert checkpoint.read_state(path, STEPS) == whole


def test_a_run_goes_on_with_a_damaged_state(finished, resume, tmp_path, caplog):
    resume(lambda run: cut(run / "trainer_state.json", 300))
    assert "evaluations since the last checkpoint are forgotten" in caplog.text
    history = json.loads((tmp_path / "copy" / "trainer_state.json").read_text())["log_history"]
    expected = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    assert [e["step"] for e in history if "loss" in e] == [e["step"] for e in expected if "loss" in e]
    assert [e for e in history if "eval_loss" in e] == [e for e in expected if "eval_loss" in e]


def test_a_state_that_is_ahead_of_the_journal_is_cut_to_it(finished, resume, tmp_path):
    resume(lambda run: cut(run / "journal", (run / "journal").stat().st_size - 5 * 64))
    histories = [
        [(e["step"], e["eval_loss"]) for e in json.loads(path.read_text())["log_history"] if "eval_loss" in e]
        for path in (finished / "trainer_state.json", tmp_path / "copy" / "trainer_state.json")
    ]
    assert histories[0] == histories[1]


def test_a_damaged_best_checkpoint_is_never_the_result(model_folder, tmp_path, caplog):
    run = tmp_path / "run"
    options = {"load_best_model_at_end": True, "save_total_limit": 1, "eval_steps": 2, "learning_rate": 3e-2}
    best = train(config_of(model_folder("bert"), run, **options)).best_checkpoint
    cut(best / "adapter_model.safetensors", 200)
    before = load_file(run / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the best checkpoint, is damaged or missing"):
        train(config_of(model_folder("bert"), run, **options, resume_from_checkpoint=True))
    replay(run, tmp_path / "replayed")
    assert_same_weights(run, tmp_path / "replayed")
    assert before.keys() == load_file(run / "adapter_model.safetensors").keys()
    cut(run / "trainer_state.json", 50)
    with pytest.raises(UserError, match="is damaged"):
        replay(run, tmp_path / "never")
    with pytest.raises(UserError, match="is damaged"):
        api.summary(run)


def test_a_moved_run_finds_its_best_checkpoint(model_folder, tmp_path):
    options = {"load_best_model_at_end": True, "eval_steps": 2, "max_steps": 6}
    best = train(config_of(model_folder("bert"), tmp_path / "run", **options)).best_checkpoint
    (tmp_path / "run").rename(tmp_path / "moved")
    again = train(config_of(model_folder("bert"), tmp_path / "moved", **options, resume_from_checkpoint=True))
    assert again.best_checkpoint == tmp_path / "moved" / best.name


# --- a disk that refuses ----------------------------------------------------------------------------------------------


class Refusal:
    """Makes the n-th change of files under a folder fail, whatever part of Python makes it."""

    def __init__(self):
        self.folder, self.after, self.number = "", -1, 0
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if self.after < 0 or not (changes or writes) or not str(arguments[0]).startswith(self.folder):
            return
        if self.after == 0:
            raise OSError(self.number, os.strerror(self.number), str(arguments[0]))
        self.after -= 1


@pytest.fixture(scope="module")
def refusal():
    made = Refusal()  # an audit hook stays for good; it sleeps while `after` is negative
    yield made
    made.after = -1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_every_refused_change_is_one_line_and_the_run_goes_on_later(
    capsys, refusal, model_folder, tmp_path, jsonl, number
):
    run, straight = tmp_path / "run", tmp_path / "straight"
    options = (*MASKED, *LORA, "--save_steps", 1, "--save_total_limit", 1, "--per_device_train_batch_size", 4)
    arguments = train_arguments(model_folder("bert"), jsonl(SENTIMENT_ROWS[:20]), run, *options, steps=2)
    assert run_cli(capsys, *(straight if a == run else a for a in arguments)).status == 0
    refusal.folder, refusal.number = str(run), number
    lasting = number == errno.EROFS  # a disk that has become read-only stays so
    ignored = 0
    for nth in range(0, 1000, 2 if number == errno.ENOSPC else 7):
        shutil.rmtree(run, ignore_errors=True)
        refusal.after = nth
        finished = run_cli(capsys, *arguments)
        refused, refusal.after = refusal.after == 0, -1
        if not refused:
            break
        if finished.status:
            assert os.strerror(number) in error_line(finished)
        else:
            ignored += 1
        if lasting and (run / "journal").exists():
            refusal.after = 0
            assert os.strerror(number) in error_line(run_cli(capsys, *arguments, "--resume_from_checkpoint"))
            refusal.after = -1
        assert run_cli(capsys, *arguments, "--resume_from_checkpoint").status == 0, nth
        assert_same_weights(run, straight)
        assert not list(run.rglob("*.partial"))
    assert nth > 20 and ignored <= 1  # what fails in the very last clean-up is not worth an error


def test_a_journal_that_can_neither_be_written_nor_cut_is_resumed(finished, tmp_path, monkeypatch):
    path = tmp_path / "journal"
    shutil.copy(finished / "journal", path)
    opened, contents = journal.Journal.resume(path)
    real_write = os.write

    def fail_halfway(fd, data):
        if len(data) < 64:
            raise OSError(errno.EIO, "Input/output error")
        return real_write(fd, data[:30])

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "write", fail_halfway)
    monkeypatch.setattr(os, "ftruncate", fail)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"Input/output error while writing the journal: .*journal"):
        opened.append([contents.steps[-1][0]])
    with pytest.raises(OSError, match=r"Input/output error while syncing the journal: .*journal"):
        opened.sync()
    monkeypatch.undo()
    opened.close()
    opened, again = journal.Journal.resume(path)
    opened.close()
    assert (again.steps, again.dropped_bytes) == (contents.steps, 30)

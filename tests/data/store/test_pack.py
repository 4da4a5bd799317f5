"""Tests of packing: every sample is in the store or named, and what was packed is not lost or repeated."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from everest_ds.cli.app import main
from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.maintenance.picture_error import psnr_db
from everest_ds.data.order import fingerprint
from everest_ds.data.store.index import StoredSamples
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.stored_video import check_stored
from everest_ds.data.video_list import Sample, write_manifest
from everest_ds.errors import DataError, UsageError
from tests.data.conftest import noisy_pictures, write_video
from tests.data.store.conftest import pack, samples_of

REPOSITORY = Path(__file__).parents[3]


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["everest-ds", "data", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def intact(store: Path) -> list[Sample]:
    """Return the samples of a store, every byte of which was checked."""
    samples = list(samples_of(store))
    for sample in samples:
        assert sample.stored is not None
        check_stored(sample.path, sample.stored)
    return samples


def test_a_store_holds_the_frames_and_labels_of_every_sample_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codecs = {
        "a.mp4": ("libx264", "yuv420p"),
        "deep/b.avi": ("mpeg4", "yuv420p"),
        "ü c.mkv": ("libx264", "yuv444p"),
    }
    (tmp_path / "videos" / "deep").mkdir(parents=True)
    for name, (codec, pix_fmt) in codecs.items():
        write_video(tmp_path / "videos" / name, noisy_pictures(40), codec, pix_fmt=pix_fmt, bf="2")
    manifest, out = tmp_path / "list.txt", tmp_path / "store"
    manifest.write_text('"ü c.mkv" 2\ndeep/b.avi 0\na.mp4#3-30 1\na.mp4 1\n')
    words = ["pack", manifest, "--root", tmp_path / "videos", "--out", out, "--quality", 100, "--workers", 2]
    assert command(monkeypatch, *words, "--json", tmp_path / "done.json") == 0
    stored = intact(out)
    names = ["ü c.mkv", "deep/b.avi", "a.mp4#3-30", "a.mp4"]
    assert [(sample.name, sample.label) for sample in stored] == [
        (str(out / name), label) for name, label in zip(names, [2, 0, 1, 1], strict=True)
    ]
    from everest_ds.data.data_set import read_data_set

    given = read_data_set(manifest, root=tmp_path / "videos", num_classes=3, labelled=True)
    assert fingerprint(given, 5) == fingerprint(stored, 5)  # a run may go on with the store
    for source, packed in zip(given, stored, strict=True):
        data = DataConfig(decoder="pyav")
        with open_sample(source, data) as before, open_sample(packed, data) as after:
            assert before.num_frames == after.num_frames
            old, new = before.read(range(before.num_frames)), after.read(range(before.num_frames))
        # Frame by frame: the neighbours of a frame differ much more from it.
        assert all(psnr_db(o.numpy(), n.numpy()) > 18 for o, n in zip(old, new, strict=True))
        assert psnr_db(old[3].numpy(), new[4].numpy()) < 15
    facts = json.loads((tmp_path / "done.json").read_text())
    assert facts["samples"] == 4
    assert facts["frames"] == 40 + 40 + 27 + 40
    assert facts["bytes"] == sum(sample.stored.num_bytes for sample in stored if sample.stored)
    listed = (out / "samples.csv").read_text().splitlines()
    assert re.fullmatch(r"ü c.mkv,2,00000.tar,0000000[0-3],40,96,128", listed[1])


def test_the_shards_are_tar_files_as_webdataset_groups_them(packed_motion: StoredSamples) -> None:
    shards = sorted(packed_motion.shards.glob("*.tar"))
    assert len(shards) > 2
    seen = []
    for shard in shards:
        subprocess.run(["tar", "tf", shard], check=True, capture_output=True)
        with tarfile.open(shard) as members:
            keys = [member.name.partition(".")[0] for member in members]  # up to the first dot of the name
            groups = [key for place, key in enumerate(keys) if place == 0 or keys[place - 1] != key]
            assert len(groups) == len(set(groups))  # a sample's members are neighbours
            for key in groups:
                facts = members.extractfile(f"{key}.json")
                assert facts is not None
                seen.append(json.load(facts)["name"])
                assert {name.partition(".")[2] for name in members.getnames() if name.startswith(key)} == {
                    "json",
                    "npy",
                    *(f"{frame:06d}.jpg" for frame in range(20)),
                }
    folder = packed_motion.shards.parent
    assert sorted(seen) == sorted(str(sample.path.relative_to(folder)) for sample in packed_motion)


def test_a_video_that_cannot_be_packed_is_named_and_the_others_are_packed(
    tmp_path: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = samples_of(motion_data / "val.txt")[:3]
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    write_manifest(tmp_path / "list.txt", [good[0], Sample(tmp_path / "broken.mp4", 0), *good[1:]], tmp_path)
    words = ["pack", tmp_path / "list.txt", "--out", tmp_path / "store", "--workers", 1]
    assert command(monkeypatch, *words) == 3
    shown = capsys.readouterr()
    assert "1 of 4 videos were not packed" in shown.out + shown.err
    assert "broken.mp4" in shown.out + shown.err
    assert [sample.label for sample in intact(tmp_path / "store")] == [sample.label for sample in good]


def test_repeating_packs_only_what_is_new_or_changed(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, noisy_pictures(5, 48, 64))
    manifest, out = tmp_path / "list.txt", tmp_path / "store"
    manifest.write_text("a.mp4 0\nb.mp4 1\n")
    pack(manifest, out)
    before = {sample.path.name: sample.stored for sample in intact(out)}
    assert pack(manifest, out).num_known == 2
    write_video(tmp_path / "b.mp4", noisy_pictures(7, 48, 64))
    write_video(tmp_path / "c.mp4", noisy_pictures(3, 48, 64))
    manifest.write_text("c.mp4 0\na.mp4 4\nb.mp4 1\n")
    assert pack(manifest, out).num_known == 1
    after = {sample.path.name: sample for sample in intact(out)}
    assert list(after) == ["c.mp4", "a.mp4", "b.mp4"]
    assert after["a.mp4"].stored == before["a.mp4"]
    assert after["a.mp4"].label == 4  # labels come from the manifest, not from the shards
    assert [sample.stored.num_frames for sample in after.values() if sample.stored] == [3, 5, 7]


def test_a_damaged_sample_is_packed_again_once_a_check_has_found_it(
    tmp_path: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "store"
    pack(motion_data / "val.txt", out)
    first, second = intact(out)[:2]
    assert first.stored is not None
    content = bytearray(first.stored.shard.read_bytes())
    content[first.stored.start + 700] ^= 1
    first.stored.shard.write_bytes(content)
    assert command(monkeypatch, "check", out, "--workers", 1) == 3
    again = pack(motion_data / "val.txt", out)
    assert again.num_known == 11
    mended = intact(out)
    assert mended[1].stored == second.stored
    assert mended[0].stored != first.stored
    assert command(monkeypatch, "check", out, "--workers", 1) == 0


def test_a_lost_shard_is_packed_again(tmp_path: Path, motion_data: Path) -> None:
    out = tmp_path / "store"
    pack(motion_data / "val.txt", out)
    lost = intact(out)[5].stored
    assert lost is not None
    lost.shard.unlink()
    assert 0 < pack(motion_data / "val.txt", out).num_known < 12
    assert len(intact(out)) == 12


def test_other_settings_and_other_folders_are_refused(tmp_path: Path, motion_data: Path) -> None:
    manifest = motion_data / "val.txt"
    pack(manifest, tmp_path / "store", Packing(quality=80))
    with pytest.raises(UsageError, match="packed with other settings.*quality90.*quality80"):
        pack(manifest, tmp_path / "store", Packing(quality=90))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds other things than a frame store; given: thesis.tex"):
        pack(manifest, tmp_path / "mine")
    with pytest.raises(UsageError, match="an input of the command lies in this folder"):
        pack(tmp_path / "store", tmp_path / "store", Packing(quality=80))


def test_a_store_can_be_packed_anew_with_other_settings(tmp_path: Path, packed_motion: StoredSamples) -> None:
    pack(packed_motion.shards.parent, tmp_path / "small", Packing(quality=30, every=2))
    small = intact(tmp_path / "small")
    assert fingerprint(small, 0) == fingerprint(packed_motion, 0)
    assert all(
        less.stored.num_bytes < 0.7 * more.stored.num_bytes
        for less, more in zip(small, packed_motion, strict=True)
        if less.stored and more.stored
    )


def test_a_dry_run_predicts_the_size_and_writes_nothing(
    tmp_path: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["pack", motion_data / "train.txt", "--out", tmp_path / "store", "--workers", 1]
    assert command(monkeypatch, *words, "--dry-run", "--json", tmp_path / "plan.json") == 0
    assert not (tmp_path / "store").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    pack(motion_data / "train.txt", tmp_path / "store", Packing())
    actual = sum(sample.stored.num_bytes for sample in intact(tmp_path / "store") if sample.stored)
    assert plan["videos_left"] == 24
    assert abs(plan["bytes"] / actual - 1) < 0.1
    assert plan["minutes"] > 0


def test_too_little_room_is_said_before_the_work(
    tmp_path: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer = pack(motion_data / "val.txt", tmp_path / "store")
    free = shutil.disk_usage(tmp_path).free
    per_sample = packer.estimate(1).num_bytes
    packer.check_room(tmp_path, int(0.5 * free / per_sample))
    with pytest.raises(
        DataError, match="too little disk space for the frame store; given: .* GB free; allowed: about"
    ):
        packer.check_room(tmp_path, int(2 * free / per_sample))


_PACK = """
import sys
from pathlib import Path
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.shards import packing_into
from everest_ds.data.data_set import read_data_set
if __name__ == "__main__":
    manifest, out = map(Path, sys.argv[1:])
    samples = read_data_set(manifest, root=None, num_classes=None, labelled=False)
    with packing_into(out, []):
        packer = StorePacker(samples, manifest.parent, out, Packing(), 2, shard_bytes=300_000)
        print(packer.num_known, flush=True)
        packer.pack_all(lambda done: print(done, flush=True))
        packer.finish()
"""


def test_a_full_disk_loses_nothing(tmp_path: Path, motion_data: Path) -> None:
    """Packing goes on where it stopped, once there is room; the disk is a real one of 500 KiB."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make mount namespaces (root)")
    (tmp_path / "pack.py").write_text(_PACK)
    script = f"""
mount -t tmpfs -o size=500k small {tmp_path}/disk
{sys.executable} {tmp_path}/pack.py {motion_data}/train.txt {tmp_path}/disk/store
echo "ended with $?"
mount -o remount,size=5m {tmp_path}/disk
{sys.executable} {tmp_path}/pack.py {motion_data}/train.txt {tmp_path}/disk/store
echo "ended with $?"
cp -r {tmp_path}/disk/store {tmp_path}/store
"""
    (tmp_path / "disk").mkdir()
    words = ["unshare", "-m", "sh", "-c", script]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    first, second = done.stdout.split("ended with 1\n")
    assert first.split()[0] == "0"
    known, *_, end = second.split("\n")[:-1]
    assert end == "ended with 0"
    assert int(known) > 3
    assert "cannot be written; given: No space left on device; fix: free disk space" in done.stderr
    assert len(intact(tmp_path / "store")) == 24


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path, motion_data: Path) -> None:
    """Each of 480 samples is packed once or, if a kill met it, again; a complete store is never invalid."""
    videos = [sample.path for sample in samples_of(motion_data / "train.txt")]
    spans = [Sample(path, 1, (first, first + 1)) for path in videos for first in range(20)]
    write_manifest(tmp_path / "list.txt", spans, motion_data)
    (tmp_path / "pack.py").write_text(_PACK)
    shutil.copytree(motion_data, tmp_path / "data")
    (tmp_path / "list.txt").rename(tmp_path / "data" / "list.txt")
    words = [
        sys.executable,
        *map(str, (tmp_path / "pack.py", tmp_path / "data/list.txt", tmp_path / "store")),
    ]
    rng, known = random.Random(17), []
    for _ in range(20):
        process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        known.append(int(process.stdout.readline()))
        process.stdout.readline()
        process.stdout.readline()  # the first sample is packed
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
    assert known == sorted(known)
    assert known[-1] > 20
    subprocess.run(words, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    packed = intact(tmp_path / "store")
    assert [sample.path.name for sample in packed] == [
        f"{s.path.name}#{s.span[0]}-{s.span[1]}" for s in spans if s.span
    ]
    for shard in (tmp_path / "store" / "shards").glob("*.tar"):
        subprocess.run(["tar", "tf", shard], check=True, capture_output=True)
    log = next((tmp_path / "store").glob("packing-*.jsonl")).read_text().splitlines()
    assert len({json.loads(line)["name"] for line in log}) == 480
    assert len(log) < 480 + 20 * 3  # at most the samples in work are packed again


def test_a_reader_never_meets_a_store_in_the_making(tmp_path: Path, motion_data: Path) -> None:
    from everest_ds.data.store.index import is_store
    from everest_ds.data.store.pack import StorePacker
    from everest_ds.data.store.shards import packing_into

    samples, out = samples_of(motion_data / "val.txt"), tmp_path / "store"
    with packing_into(out, []):
        packer = StorePacker(samples, motion_data, out, Packing(), 1)
        packer.pack_some(lambda done: None)
        with pytest.raises(DataError, match="packing this frame store was interrupted; fix: repeat"):
            is_store(out)
        with pytest.raises(UsageError, match="another process packs into this folder"):
            _in_another_process(out)
        packer.pack_all(lambda done: None)
        packer.finish()
    assert len(intact(out)) == 12


def _in_another_process(out: Path) -> None:
    script = f"""
from pathlib import Path
from everest_ds.data.store.shards import packing_into
with packing_into(Path({str(out)!r}), []):
    pass
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    if "UsageError" in done.stderr:
        raise UsageError(done.stderr.splitlines()[-1])

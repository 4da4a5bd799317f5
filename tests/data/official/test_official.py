"""Tests of official data sets: annotation files in their published form are converted to manifests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.cli.app import main
from everest_ds.config import load_experiment
from everest_ds.data.official import DATASETS, Indexed, find_dataset, index_dataset
from everest_ds.data.video_list import read_class_names, read_manifest
from everest_ds.errors import DataError, UsageError

KINETICS_TRAIN = """label,youtube_id,time_start,time_end,split,is_cc
"tying knot (not on a tie)",-0Ab_cdEFgh,20,30,train,0
abseiling,0347ZoDXyP0,95,105,train,1
abseiling,gone_gone_0,0,10,train,0
"""
KINETICS_VAL = {
    "zz-1_abcdEF": {
        "annotations": {"label": "abseiling", "segment": [7.0, 17.0]},
        "duration": 10.0,
        "subset": "validate",
        "url": "https://www.youtube.com/watch?v=zz-1_abcdEF",
    }
}
SSV2_LABELS = {"Moving something up": "1", "Approaching something with your camera": "0"}
SSV2_TRAIN = [
    {
        "id": "78687",
        "label": "moving cup up",
        "template": "Moving [something] up",
        "placeholders": ["cup"],
    },
    {
        "id": "42326",
        "label": "approaching plant with your camera",
        "template": "Approaching [something] with your camera",
        "placeholders": ["plant"],
    },
]
OSCC_CLIP = {
    "clip_uid": None,
    "clip_id": "1042",
    "unique_id": "c31c6a6f-e65d-449f-a624-f9dceef9057f-1_15-9_15",
    "video_uid": "4e3fc1e9-424f-4921-9068-d468c135f347",
    "clip_start_frame": 34,
    "clip_end_frame": 274,
    "parent_start_sec": 1.1543619333333333,
    "parent_end_sec": 9.154361933333332,
    "parent_start_frame": 34,
    "parent_end_frame": 274,
    "state_change": True,
    "parent_pnr_frame": 157,
}


def touch(folder: Path, *names: str) -> Path:
    """Create empty files, which are enough because indexing looks at names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def write(folder: Path, **files: object) -> Path:
    """Write annotation files; in a keyword, `__` denotes a dash and the last `_` the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, content in files.items():
        name = ".".join(key.replace("__", "-").rsplit("_", 1))
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def index(name: str, tmp_path: Path, fold: int = 1) -> Indexed:
    return index_dataset(find_dataset(name), tmp_path / "lists", tmp_path / "videos", fold)


def found(indexed: Indexed, split: str, root: Path) -> list[tuple[str, int | None]]:
    return [(str(s.path.relative_to(root / "videos")), s.label) for s in indexed.splits[split]]


def test_kinetics_from_csv_and_json_with_labels_in_alphabetical_order(tmp_path: Path) -> None:
    write(tmp_path / "lists", train_csv=KINETICS_TRAIN, validate_json=KINETICS_VAL)
    touch(
        tmp_path / "videos",
        "train/tying knot (not on a tie)/-0Ab_cdEFgh_000020_000030.mp4",
        "train/abseiling/0347ZoDXyP0_000095_000105.mp4",
        "val/abseiling/zz-1_abcdEF.mkv",  # some mirrors name files by video id alone
    )
    indexed = index("k400", tmp_path)
    assert indexed.classes == ["abseiling", "tying knot (not on a tie)"]
    assert found(indexed, "train", tmp_path) == [
        ("train/tying knot (not on a tie)/-0Ab_cdEFgh_000020_000030.mp4", 1),
        ("train/abseiling/0347ZoDXyP0_000095_000105.mp4", 0),
    ]
    assert found(indexed, "val", tmp_path) == [("val/abseiling/zz-1_abcdEF.mkv", 0)]
    assert indexed.missing == {"train": ["gone_gone_0_000000_000010"], "val": []}


def test_a_kinetics_test_split_without_labels_keeps_its_videos(tmp_path: Path) -> None:
    header = "youtube_id,time_start,time_end,split\n"
    write(tmp_path / "lists", train_csv=KINETICS_TRAIN, test_csv=header + "abcdefghijk,1,11,test\n")
    touch(tmp_path / "videos", "abcdefghijk_000001_000011.mp4")
    indexed = index("k400", tmp_path)
    assert found(indexed, "test", tmp_path) == [("abcdefghijk_000001_000011.mp4", None)]
    assert len(indexed.missing["train"]) == 3


@pytest.mark.parametrize("prefix", ["", "something__something__v2__"])
def test_ssv2_by_template_under_old_and_new_file_names(tmp_path: Path, prefix: str) -> None:
    files = {"labels_json": SSV2_LABELS, "train_json": SSV2_TRAIN, "validation_json": SSV2_TRAIN[:1]}
    files["test_json"] = [{"id": "1"}, {"id": "2"}]
    write(tmp_path / "lists", **{prefix + name: content for name, content in files.items()})
    (tmp_path / "lists" / (prefix.replace("__", "-") + "test-answers.csv")).write_text(
        "1;Moving [something] up\n"
    )
    touch(tmp_path / "videos", "78687.webm", "42326.webm", "1.webm", "2.webm")
    indexed = index("ssv2", tmp_path)
    assert indexed.classes == ["Approaching something with your camera", "Moving something up"]
    assert found(indexed, "train", tmp_path) == [("78687.webm", 1), ("42326.webm", 0)]
    assert found(indexed, "val", tmp_path) == [("78687.webm", 1)]
    assert found(indexed, "test", tmp_path) == [("1.webm", 1), ("2.webm", None)]


def test_ucf101_by_fold(tmp_path: Path) -> None:
    lists = {"classInd_txt": "1 ApplyEyeMakeup\n2 YoYo\n"}
    lists["trainlist02_txt"] = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\nYoYo/v_YoYo_g08_c02.avi 2\n"
    lists["testlist02_txt"] = "YoYo/v_YoYo_g01_c01.avi\r\n"
    write(tmp_path / "lists", **lists)
    touch(
        tmp_path / "videos/UCF-101",
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi",
        "YoYo/v_YoYo_g08_c02.avi",
        "YoYo/v_YoYo_g01_c01.avi",
    )
    indexed = index("ucf101", tmp_path, fold=2)
    assert [s.label for s in indexed.splits["train"]] == [0, 1]
    assert found(indexed, "test", tmp_path) == [("UCF-101/YoYo/v_YoYo_g01_c01.avi", 1)]
    with pytest.raises(DataError, match="trainlist01"):
        index("ucf101", tmp_path, fold=1)
    with pytest.raises(UsageError, match=r"given: 4; allowed: 1\.\.3"):
        index("ucf101", tmp_path, fold=4)


def test_hmdb51_names_with_signs_and_blanks_and_the_same_name_in_two_classes(tmp_path: Path) -> None:
    write(
        tmp_path / "lists",
        clap_test_split1_txt="#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 1 \nA&B;(x)_clap_0.avi 2 \na.avi 0 \n",
        brush_hair_test_split1_txt="#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi 2 \n",
    )
    touch(
        tmp_path / "videos",
        "clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi",
        "brush_hair/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi",
        "clap/A&B;(x)_clap_0.avi",
    )
    indexed = index("hmdb51", tmp_path)
    assert indexed.classes == ["brush_hair", "clap"]
    assert found(indexed, "train", tmp_path) == [("clap/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", 1)]
    assert found(indexed, "test", tmp_path) == [
        ("brush_hair/#20_Rhythm_clap_u_nm_np1_fr_goo_0.avi", 0),
        ("clap/A&B;(x)_clap_0.avi", 1),
    ]


def test_oscc_clips_are_parts_of_full_videos_unless_cut_already(tmp_path: Path) -> None:
    cut = OSCC_CLIP | {"unique_id": "cut", "state_change": False}
    test = {
        key: OSCC_CLIP[key] for key in ("unique_id", "video_uid", "parent_start_frame", "parent_end_frame")
    }
    write(
        tmp_path / "lists",
        **{
            "fho_oscc__pnr_train_json": {"clips": [OSCC_CLIP, cut]},
            "fho_oscc__pnr_test_unannotated_json": {"clips": [test]},
        },
    )
    video = f"full_scale/{OSCC_CLIP['video_uid']}.mp4"
    touch(tmp_path / "videos", video, "clips/cut.mp4")
    indexed = index("oscc", tmp_path)
    whole, part = indexed.splits["train"][1], indexed.splits["train"][0]
    assert (part.path.name, part.label, part.span) == (Path(video).name, 1, (34, 274))
    assert (whole.path.name, whole.label, whole.span) == ("cut.mp4", 0, None)
    assert [(s.label, s.span) for s in indexed.splits["test"]] == [(None, (34, 274))]


def test_two_files_for_one_video_are_named_not_chosen_from(tmp_path: Path) -> None:
    write(tmp_path / "lists", train_csv=KINETICS_TRAIN)
    touch(tmp_path / "videos", "a/0347ZoDXyP0_000095_000105.mp4", "b/0347ZoDXyP0_000095_000105.mp4")
    with pytest.raises(DataError, match="several files for one video"):
        index("k400", tmp_path)


def test_a_folder_without_any_listed_video_says_what_is_looked_for(tmp_path: Path) -> None:
    write(tmp_path / "lists", train_csv=KINETICS_TRAIN)
    touch(tmp_path / "videos", "other.mp4").joinpath("circle").symlink_to(tmp_path / "videos")
    with pytest.raises(DataError, match="-0Ab_cdEFgh_000020_000030 is listed"):
        index("k400", tmp_path)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "an annotation file is missing; allowed: train.csv"),
        ({"train_csv": "label,youtube_id\na,b\n"}, "train.csv:2: no time_start"),
        ({"train_json": "{"}, "train.json: not JSON"),
    ],
)
def test_a_wrong_annotation_is_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    write(tmp_path / "lists", **files)
    touch(tmp_path / "videos", "a.mp4")
    with pytest.raises(DataError, match=says):
        index("k400", tmp_path)


def test_the_command_writes_manifests_missing_files_and_configs_that_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "lists", train_csv=KINETICS_TRAIN, validate_json=KINETICS_VAL)
    touch(tmp_path / "videos", "0347ZoDXyP0_000095_000105.mp4", "zz-1_abcdEF_000007_000017.mp4")
    out = tmp_path / "k400"
    options = ("annotations", tmp_path / "lists"), ("videos", tmp_path / "videos"), ("out", out)
    words = [word for name, value in options for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["everest-ds", "data", "index", "k400", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert (out / "missing.txt").read_text().split() == [
        "train",
        "-0Ab_cdEFgh_000020_000030",
        "train",
        "gone_gone_0_000000_000010",
    ]
    assert len(read_manifest(out / "train.txt", root=None, num_classes=2, labelled=True)) == 1
    assert len(read_class_names(out / "classes.txt")) == 2
    assert load_experiment(out / "pretrain.yaml").data.train == out / "train.txt"
    finetune = load_experiment(out / "finetune.yaml")
    assert (finetune.data.test, finetune.model.num_classes) == (out / "val.txt", 2)
    printed = capsys.readouterr()
    assert "5 x 3" in printed.out and "stride 4" in printed.out
    assert "found 2 of the 400 classes of Kinetics-400" in printed.err


# (pre-training stride, fine-tuning stride, temporal views, spatial views, flips); stride None: segments
RECIPES = {
    "k400": (4, 4, 5, 3, True),
    "ssv2": (2, None, 2, 3, False),
    "ucf101": (4, 4, 5, 3, True),
    "hmdb51": (2, 2, 10, 3, True),
    "oscc": (None, None, 2, 3, True),
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_data_set_has_its_published_recipe(name: str) -> None:
    dataset = DATASETS[name]
    pretrain, finetune = (load_experiment(dataset.recipes[task]) for task in ("pretrain", "finetune"))
    strides = [
        None if config.data.sampling == "segments" else config.data.frame_stride
        for config in (pretrain, finetune)
    ]
    data = finetune.data
    assert (*strides, data.test_segments, data.test_crops, data.horizontal_flip) == RECIPES[name]
    assert finetune.model.num_classes == dataset.num_classes
    assert pretrain.tokens.frame_oversampling == (1.5 if name == "oscc" else 1.0)

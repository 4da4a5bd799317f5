"""Tests of odd files: with every decoder the pictures are those of sequential decoding, and upright."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest

from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.decoding.probe import probe
from everest_ds.errors import DataError
from tests.data.conftest import all_frames
from tests.data.decoding.odd_files import ORIENTATIONS, OddFile, odd_files, oriented
from tests.data.decoding.test_decoders import assert_exact, assert_part_exact, decoder

__all__ = ["decoder"]


@pytest.mark.parametrize("odd", odd_files(), ids=str)
def test_pictures_of_an_odd_file_equal_sequential_decoding(
    odd: OddFile, decoder: str, tmp_path: Path
) -> None:
    assert_exact(odd.make(tmp_path), decoder)


def test_there_are_sixty_odd_files() -> None:
    assert len({odd.name for odd in odd_files()}) >= 60


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_pictures_are_turned_and_mirrored_as_players_do(name: str, decoder: str, tmp_path: Path) -> None:
    corner, shown = ORIENTATIONS[name]
    file, turned = oriented(tmp_path, corner)
    stored = all_frames(file)
    with open_video(turned, decoder) as video:
        pictures = video.read([7, 2, 11]).numpy()
        assert_part_exact(video, [7, 2, 11], np.stack([shown(picture) for picture in stored]), Random(0))
    np.testing.assert_array_equal(pictures, [shown(stored[number]) for number in (7, 2, 11)])


@pytest.mark.parametrize("degrees", [0.3, 89.7, 180.4, 270.2])
def test_an_angle_that_rounds_to_a_right_one_is_that(degrees: float, decoder: str, tmp_path: Path) -> None:
    turn = np.deg2rad(degrees)
    corner = (np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn))
    file, turned = oriented(tmp_path, corner)
    stored = all_frames(file)
    with open_video(turned, decoder) as video:
        picture = video.read([5]).numpy()[0]
    np.testing.assert_array_equal(picture, np.rot90(stored[5], -round(degrees / 90)))


@pytest.mark.parametrize("degrees", [2, 45, 178])
def test_another_angle_is_refused_by_name(degrees: float, decoder: str, tmp_path: Path) -> None:
    turn = np.deg2rad(degrees)
    _, path = oriented(tmp_path, (np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)))
    with open_video(path, decoder) as video, pytest.raises(DataError, match=f"given: {degrees} degrees"):
        video.read([0])


def test_the_probe_names_what_is_odd(tmp_path: Path) -> None:
    named = {
        "libx264 yuv420p in .mp4": set(),
        "libx264 yuv420p10le in .mp4": {"pixel format yuv420p10le"},
        "interlaced, top field first": {"interlaced pictures"},
        "cut before picture 7": {"an edit list"},
        "two video tracks": {"several video tracks"},
    }
    made = {odd.name: odd for odd in odd_files()}
    for number, (name, oddities) in enumerate(named.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert probe(made[name].make(folder)).oddities == oddities, name

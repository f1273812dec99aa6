"""Labels that a detector's classes are: by name, alternative spelling, and word vectors."""

from __future__ import annotations

import numpy as np
import pytest

from gm_mlic.embeddings import labels_of, labels_of_classes


def angles(*degrees: float) -> np.ndarray:
    """Vectors in the plane; the norm differs from 1."""
    radians = np.deg2rad(degrees)
    return 3 * np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_equal_names_and_alternative_spellings():
    assert labels_of_classes(["couch", "dog", "tv"], ["dog", "sofa", "tvmonitor"]) == [[1], [0], [2]]
    assert labels_of_classes(["sofa"], ["couch"]) == [[0]]


def test_one_class_is_several_labels():
    """NUS-WIDE and Visual Genome have labels of the same meaning."""
    classes, labels = ["dining table", "cup"], ["table", "diningtable", "cup"]
    found = labels_of_classes(classes, labels)
    assert sorted(found[0]) == [0, 1]
    assert found[1] == [2]
    # `labels_of` gives each class one label.
    assert sum(c >= 0 for c in labels_of(classes, labels)) == 2


def test_one_label_of_several_classes():
    assert labels_of_classes(["person", "person"], ["person"]) == [[0], [0]]


def test_no_common_word():
    assert labels_of_classes(["cup", "fork"], ["sky", "water"]) == [[], []]
    assert labels_of_classes([], ["sky"]) == []
    assert labels_of_classes(["cell"], ["sky"], angles(0), angles(90)) == [[]]


def test_remaining_labels_are_matched_by_word_vectors():
    classes, labels = ["divan", "kayak", "dog"], ["settee", "canoe", "dog"]
    vectors = angles(0, 120, 240), angles(20, 110, 240)
    assert labels_of_classes(classes, labels) == [[], [], [2]]
    assert labels_of_classes(classes, labels, *vectors) == [[0], [1], [2]]


@pytest.mark.parametrize(("degrees", "matched"), [(59.9, True), (60.1, False)])
def test_smallest_cosine_similarity_is_one_half(degrees: float, matched: bool):
    assert labels_of_classes(["divan"], ["settee"], angles(0), angles(degrees)) == [[0] if matched else []]


def test_class_and_label_must_be_nearest_to_each_other():
    # The class is nearest to the second label; the first has no other class.
    assert labels_of_classes(["divan"], ["settee", "stool"], angles(0), angles(30, 10)) == [[1]]
    # The class's nearest label is another class's by name, so the class is not the second-nearest label's.
    found = labels_of_classes(["divan", "stool"], ["settee", "stool"], angles(0, 5), angles(30, 5))
    assert found == [[], [1]]


def test_class_of_another_label_by_name_gets_none_by_vectors():
    """The most similar class is taken, so the next one is compared."""
    found = labels_of_classes(["dog", "divan"], ["dog", "settee"], angles(0, 40), angles(90, 1))
    assert found == [[0], [1]]
    assert labels_of_classes(["dog"], ["dog", "settee"], angles(0), angles(0, 0)) == [[0]]


def test_unknown_words_have_zero_vectors_and_match_nothing():
    zero = np.zeros((1, 2))
    assert labels_of_classes(["divan"], ["settee"], zero, angles(0)) == [[]]
    assert labels_of_classes(["divan"], ["settee"], angles(0), zero) == [[]]
    assert labels_of_classes(["divan"], ["settee"], zero, zero) == [[]]

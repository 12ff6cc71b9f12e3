# ruff: noqa: UP032 (Python 2 has no f-strings)
"""Writes python2_pickles.zip: a small set in MMSA's layout, as Python 2 pickles it in each of its protocols.

    PYTHONPATH=FOLDER_OF_NUMPY python2.7 make_python2_pickles.py python2_pickles.zip

Runs under Python 2.7 and under Python 3, where the tests make the same set and compare; without hcmen.
"""

import sys
import zipfile

import numpy as np

SAMPLES = {"train": 4, "valid": 2, "test": 3}


def data():
    """The set: byte strings as keys, names and texts, arrays of every kind of number, some larger than 64 KiB."""
    made = {}
    for split, count in sorted(SAMPLES.items()):
        text = np.arange(count * 3 * 4, dtype=np.float64).reshape(count, 3, 4) / 7 - 1
        audio = (np.arange(count * 90 * 100, dtype=np.float32).reshape(count, 90, 100) % 1000) / 3 + 1
        vision = np.asfortranarray((np.arange(count * 5 * 2).reshape(count, 5, 2) % 251 + 1).astype(np.float32))
        made[split] = {
            "text": text,
            "audio": audio,
            "vision": vision,
            "regression_labels": np.linspace(-3, 3, count),
            "id": ["{}$_${}".format(split, i) for i in range(count)],
            "names": np.array(["{} {}".format(split, i) for i in range(count)]),
            "raw_text": ["a quote ' and \" and \\ and \n", "caf\xc3\xa9", "", "\x00\xff"][:count],
            "annotations": np.array([b"good".decode("ascii"), b"gut".decode("ascii")][:count], dtype=object),
            "classification_labels": [np.float64(0.1), np.int32(-5), 7, True, None, b"\xe4\xbd\xa0".decode("utf-8")],
        }
    return made


def main(path):
    """Writes the archive."""
    import pickle

    import cPickle

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for protocol in range(3):
            for name, module in (("c", cPickle), ("python", pickle)):
                entry = zipfile.ZipInfo("{}-{}.pkl".format(name, protocol))
                archive.writestr(entry, module.dumps(data(), protocol), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(sys.argv[1])

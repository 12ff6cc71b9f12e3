"""Writes numpy_pickles/NUMPY-VERSION.zip: arrays in every memory order, pickled by that NumPy in every protocol it has.

    for each NumPy:  PYTHONPATH=ITS_FOLDER python make_numpy_pickles.py numpy_pickles

Runs under Python 3.6 and later and NumPy 1.13 and later, without hcmen.
"""

import itertools
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np


def arrays():
    """Name -> array; the tests make the same ones and compare."""
    base = np.arange(2 * 3 * 4, dtype=np.float64).reshape(2, 3, 4) - 7.5
    found = {}
    for order in itertools.permutations(range(3)):
        name = "".join(map(str, order))
        found["view " + name] = base.transpose(order)
        found["indexed " + name] = base.transpose(order)[[1, 0]]
    found["fortran"] = np.asfortranarray(base)
    found["strided"] = base[:, ::2, ::-1]
    found["broadcast"] = np.broadcast_to(base[:1], (2, 3, 4))
    found["big endian, turned"] = base.astype(">f4").transpose(2, 0, 1)
    found["half, turned"] = base.astype(np.float16).swapaxes(0, 1)
    found["integers, turned"] = base.astype(np.int16).T
    found["read only"] = base.copy()
    found["read only"].flags.writeable = False
    found["read only, turned"] = found["read only"].swapaxes(1, 2)
    found["one sample, turned"] = base[:1].transpose(0, 2, 1)
    found["no sample, turned"] = base[:0].transpose(0, 2, 1)
    found["two axes"] = base[0].T
    found["one axis"] = base[0, 0, ::-1]
    found["number"] = np.array(2.5)
    found["words"] = np.array(["good", "gut"])
    found["words, turned"] = np.array([["a", "b", "c"], ["d", "e", "f"]]).T
    found["objects"] = np.array(["good", "gut"], dtype=object)
    found["none"] = np.zeros((0, 3))
    return found


def main(folder):
    path = Path(folder) / (np.__version__ + ".zip")
    with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED) as archive:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            content = pickle.dumps({"train": arrays()}, protocol)
            archive.writestr(zipfile.ZipInfo("protocol-" + str(protocol) + ".pkl"), content, zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(sys.argv[1])

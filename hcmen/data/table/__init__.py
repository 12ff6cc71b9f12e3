"""One's own data as a table: a row a sample, in CSV, JSON lines or Parquet, converted to the folder of folder.py.

reading.py     the file, row by row, whatever its kind
rows.py        what a row has to hold, and what is wrong with those that do not
groups.py      rows into train, valid and test, groups held together
texts.py       words into tokens, with the tokenizer of a BERT
clips.py       clip files, measured and read
work.py        what is done of the slow part, kept for a conversion that is stopped, by several processes
samples.py     the splits as folder.py writes them
conversion.py  all of it in turn
"""

"""Conversion of other tools' data into data set folders: one module a source, and one pipeline for all of them.

A source lists its records once (:mod:`~partialfc.data.convert.source`); class ids, cleaning lists and the shuffle are
planned from the list alone; then processes read the records of one shard each and write it.
"""

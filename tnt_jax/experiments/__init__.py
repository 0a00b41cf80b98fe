"""What a study needs beside the programs: an experiment, its stages, corpora.

Imports every room below.
"""

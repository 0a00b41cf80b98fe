"""What a study needs beside the programs: an experiment, its stages, corpora, what `patch` decides.

Imports every room below.
"""

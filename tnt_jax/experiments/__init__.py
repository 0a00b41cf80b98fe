"""What a study needs beside the programs: an experiment's folder, and corpora.

Imports every room below.
"""

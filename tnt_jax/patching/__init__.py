"""What `patch` does: what it is asked, the rules by which it chooses and stops, what it shows.

Imports all rooms below `patch`, and the programs that it calls.
"""

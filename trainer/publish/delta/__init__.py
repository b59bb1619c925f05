"""What changed between two published versions: found, packed, summed up, and given to servers."""

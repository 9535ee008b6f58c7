"""Rule files that ship with ktfx (package data)."""

"""The commands of `kcd`, one file each."""

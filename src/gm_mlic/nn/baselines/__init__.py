"""Models that GM-MLIC is compared with, one file each."""

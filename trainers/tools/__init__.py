"""What one does to finished files: inspect; convert, merge. One file each."""

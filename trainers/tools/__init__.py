"""What one does to finished files: inspect; later convert, merge, resize. One file each."""

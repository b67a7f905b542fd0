"""Images: files, addresses and bytes to pixels, and pixels to pages."""

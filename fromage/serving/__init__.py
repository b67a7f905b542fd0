"""FROMAGe over HTTP: `app` puts it together."""

"""Many students from one cache: `singer sweep FILE --cache CACHE --out FOLDER`."""

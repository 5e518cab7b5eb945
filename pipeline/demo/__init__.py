"""The whole chain on images that scikit-learn brings, offline."""

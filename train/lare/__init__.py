"""What only LaRe's training needs: its objectives, their modules, and its data."""

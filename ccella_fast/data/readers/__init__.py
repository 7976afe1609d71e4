"""Medical image files and folders of studies, as they come."""

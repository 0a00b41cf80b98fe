"""What TensorBoard makes of a run's event files."""

import tensorflow as tf


def events_of(folder):
    """Every event, in the order in which TensorBoard reads them; TensorFlow checks each."""
    files = sorted(str(path) for path in folder.glob("events.out.tfevents.*"))
    rows = tf.data.TFRecordDataset(files).as_numpy_iterator() if files else ()
    return [tf.compat.v1.Event.FromString(row) for row in rows]


def shown(folder):
    """The points of each curve, and the texts, as TensorBoard shows them.

    "If a START session log is found, every event with a step of at least its own is an orphan"
    (tensorboard/backend/event_processing/event_accumulator.py, file version 2).
    """
    found = {}
    for event in events_of(folder):
        if event.session_log.status == tf.compat.v1.SessionLog.START:
            for points in found.values():
                points[:] = [point for point in points if point[0] < event.step]
        for value in event.summary.value:
            is_text = value.metadata.plugin_data.plugin_name == "text"
            tensor = value.tensor
            content = tensor.string_val[0].decode() if is_text else tensor.float_val[0]
            found.setdefault(value.tag, []).append((event.step, content))
    return {tag: points for tag, points in found.items() if points}

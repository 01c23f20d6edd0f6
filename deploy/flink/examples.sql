-- Label impressions in Flink SQL and write them to a topic that stream-ctr learns from.
--
-- Both tables have the features of the simulated stream; put those of your own events there.
-- The times of events are numbers of milliseconds since 1970. The lengths of time are the defaults
-- of stream-ctr: a label window of 10 minutes, clicks up to 30 seconds before their impression, and
-- events up to 30 seconds out of order.

SET 'table.exec.state.ttl' = '1 h';              -- for so long, ids of impressions are known
SET 'table.exec.source.idle-timeout' = '30 s';   -- a silent partition then delays no other
SET 'execution.checkpointing.interval' = '30 s';

CREATE TABLE events (
  kind STRING,
  impression_id STRING,
  `time` BIGINT,
  features ROW<
    user_id STRING,
    segment STRING,
    age STRING,
    country STRING,
    device STRING,
    os STRING,
    app_id STRING,
    category STRING,
    connection STRING,
    placement STRING,
    `hour` STRING,
    last_category STRING,
    rating DOUBLE,
    days_since_visit DOUBLE
  >,
  true_probability DOUBLE,
  `partition` INT METADATA VIRTUAL,
  `offset` BIGINT METADATA VIRTUAL,
  event_time AS TO_TIMESTAMP_LTZ(`time`, 3),
  arrival AS PROCTIME(),
  WATERMARK FOR event_time AS event_time - INTERVAL '30' SECOND
) WITH (
  'connector' = 'kafka',
  'topic' = 'events',
  'properties.bootstrap.servers' = 'localhost:9092',
  'properties.group.id' = 'flink-examples',
  'scan.startup.mode' = 'earliest-offset',
  -- After each event, so that what is late depends on the log and not on the speed of the job.
  'scan.watermark.emit.strategy' = 'on-event',
  'format' = 'json',
  'json.ignore-parse-errors' = 'true'
);

CREATE TABLE examples (
  kind STRING,
  impression_id STRING,
  `time` BIGINT,
  label INT,
  features ROW<
    user_id STRING,
    segment STRING,
    age STRING,
    country STRING,
    device STRING,
    os STRING,
    app_id STRING,
    category STRING,
    connection STRING,
    placement STRING,
    `hour` STRING,
    last_category STRING,
    rating DOUBLE,
    days_since_visit DOUBLE
  >,
  true_probability DOUBLE
) WITH (
  'connector' = 'kafka',
  'topic' = 'examples',
  'properties.bootstrap.servers' = 'localhost:9092',
  'key.format' = 'raw',
  'key.fields' = 'impression_id',
  'value.format' = 'json',
  'value.json.encode.ignore-null-fields' = 'true'
);

-- The first of the impressions with an id. One that comes after the end of its label window is left
-- out: its clicks may have come and gone.
CREATE TEMPORARY VIEW impressions AS
SELECT
  impression_id, `time`, features, true_probability, event_time,
  `partition` AS log_partition, `offset` AS log_offset
FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY impression_id ORDER BY arrival) AS copy_number
  FROM events
  WHERE kind = 'impression'
    AND impression_id <> ''
    AND `time` IS NOT NULL
    AND features IS NOT NULL
    AND (
      CURRENT_WATERMARK(event_time) IS NULL
      OR CURRENT_WATERMARK(event_time) <= TO_TIMESTAMP_LTZ(`time` + 600000, 3)
    )
)
WHERE copy_number = 1;

-- The clicks, each with the watermark at which it came.
CREATE TEMPORARY VIEW clicks AS
SELECT impression_id, `time`, event_time, CURRENT_WATERMARK(event_time) AS came_at
FROM events
WHERE kind = 'click' AND impression_id <> '' AND `time` IS NOT NULL;

-- An impression with several clicks leaves the join several times, and the first is kept. Without a
-- click it leaves once, when its label window is over. So clicked impressions leave first: the last
-- line puts all into the order in which stream-ctr's own join releases them. It takes one task. Drop
-- it where one task is too slow, and set join.allowed_lateness of the run to 11 minutes.
--
-- The lower bound of BETWEEN is how long the join keeps a click for an impression that comes later.
-- How early the click itself may be stands below it.
INSERT INTO examples
SELECT 'example', impression_id, `time`, label, features, true_probability
FROM (
  SELECT *, ROW_NUMBER() OVER (PARTITION BY impression_id ORDER BY arrival) AS copy_number
  FROM (
    SELECT
      shown.impression_id,
      shown.`time`,
      CASE WHEN clicked.impression_id IS NULL THEN 0 ELSE 1 END AS label,
      shown.features,
      shown.true_probability,
      shown.event_time,
      shown.log_partition,
      shown.log_offset,
      PROCTIME() AS arrival
    FROM impressions AS shown
    LEFT JOIN clicks AS clicked
      ON clicked.impression_id = shown.impression_id
      AND clicked.event_time
        BETWEEN shown.event_time - INTERVAL '630' SECOND
        AND shown.event_time + INTERVAL '600' SECOND
      AND clicked.`time` >= shown.`time` - 30000
      AND (
        clicked.came_at IS NULL
        OR clicked.came_at <= TO_TIMESTAMP_LTZ(shown.`time` + 600000, 3)
      )
  )
)
WHERE copy_number = 1
ORDER BY event_time, log_partition, log_offset;
